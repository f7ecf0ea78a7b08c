# Everything a person does with a checkout. Each target sets up what it needs.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
LORA := model.lora.enabled=true model.lora.lora_dropout=0.1

.PHONY: run test slurm drill drills lint format bench clean

# The main job: the embedded teacher, then the student by SFT and by KD, compared.
run: $(READY)
	$(BIN)/python scripts/compare.py

test: $(READY) slurm
	$(BIN)/python -m pytest -n 2 --dist loadfile

# Slurm's packages, where root may install them; without them their tests are skipped.
slurm:
	@$(PYTHON) scripts/slurm_cluster.py install || true

# The proof of the promise on the embedded task, by SFT and by KD.
drill: $(READY)
	$(BIN)/forgelm drill output_root=$(VENV)/drill
	$(BIN)/forgelm drill mode=kd output_root=$(VENV)/drill

# For each mode and kind of task, with adapters and augmentation: about an hour on two cores.
drills: drill
	$(BIN)/forgelm drill mode=kd $(LORA) output_root=$(VENV)/drill
	$(BIN)/forgelm drill task=arithmetic task.packing=true output_root=$(VENV)/drill
	$(BIN)/forgelm drill task=arithmetic mode=kd output_root=$(VENV)/drill
	$(BIN)/forgelm drill task=arithmetic mode=rl output_root=$(VENV)/drill
	$(BIN)/forgelm drill task=arithmetic mode=rl $(LORA) output_root=$(VENV)/drill
	$(BIN)/forgelm drill task=ocr_digits $(LORA) output_root=$(VENV)/drill
	$(BIN)/forgelm drill task=ocr_digits mode=kd task.augmentation=1 output_root=$(VENV)/drill

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(READY)
	$(BIN)/python benchmarks/run.py

$(READY): pyproject.toml requirements.lock
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip -c requirements.lock
	$(BIN)/python -m pip install --quiet -c requirements.lock -e '.[dev]'
	touch $(READY)

clean:
	rm -rf $(VENV)
