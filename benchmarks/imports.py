"""Import what a run imports up to its first step, and do nothing else.

python benchmarks/imports.py FILE --record   make a run, write the modules it loaded to FILE
python benchmarks/imports.py FILE            import them, in their order
"""

from __future__ import annotations

import contextlib
import importlib
import json
import sys
from pathlib import Path


def record(file: Path) -> None:
    from forgelm.cli.main import main

    known = set(sys.modules)

    def modules() -> list[str]:
        return [name for name in sys.modules if name not in known and name != "__main__"]

    from transformers import TrainerCallback, trainer_callback

    class AtFirstStep(TrainerCallback):  # type: ignore[misc]
        def on_step_end(self, *args: object, **kwargs: object) -> None:
            file.write_text(json.dumps(modules()))

    original = trainer_callback.CallbackHandler.__init__

    def with_ours(self, callbacks, *rest):  # type: ignore[no-untyped-def]
        original(self, [*callbacks, AtFirstStep()], *rest)

    trainer_callback.CallbackHandler.__init__ = with_ours
    sys.argv = ["forgelm"]
    code = main(
        [
            "train",
            "max_steps=1",
            "run_name=recorded",
            "wandb.mode=disabled",
            "eval.before_training=false",
            "training.eval_strategy=no",
            "training.save_strategy=no",
        ]
    )
    assert code == 0


def load(file: Path) -> None:
    for name in json.loads(file.read_text()):
        # Names that only exist as attributes of their parents can't be imported by themselves.
        with contextlib.suppress(ImportError, AttributeError):
            importlib.import_module(name)


if __name__ == "__main__":
    if "--record" in sys.argv:
        record(Path(sys.argv[1]))
    else:
        load(Path(sys.argv[1]))
