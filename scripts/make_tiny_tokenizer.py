"""Write the tokenizers of the tiny models.

Usage: python scripts/make_tiny_tokenizer.py [FOLDER]

`tokenizer.json` is a lower-casing WordPiece for BERT-style pairs. Its vocabulary is the special
tokens, printable ASCII, and the words of the `train` split of `nli_mini`: a word not among them is
spelled. So is a quarter of the rarer words of that split, or else the letters would never be
trained, and unseen words would be noise. Each run gives the same bytes, which the trainer of
`tokenizers` does not.

`characters/` is for models that write: a token is a character of printable ASCII or a line break.
It adds no special tokens of its own accord; its chat template puts one for the role before each
message and the end of text after it.
"""

import string
import sys
import zlib
from collections import Counter
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, normalizers, pre_tokenizers, processors
from tokenizers.models import WordLevel, WordPiece
from transformers import PreTrainedTokenizerFast

from forgelm.tasks.nli_mini import generate

SPECIAL_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
FREQUENT = 30
FOLDER = Path(__file__).parents[1] / "forgelm" / "models" / "tiny"
WRITER_TOKENS = {
    "pad_token": "<pad>",
    "unk_token": "<unk>",
    "bos_token": "<s>",
    "eos_token": "</s>",
}
ROLES = ("system", "user", "assistant")
# `generation` marks what the model writes, for a loss on that alone.
CHAT_TEMPLATE = """\
{{- bos_token }}
{%- for message in messages %}
{%- if message.role not in ["system", "user", "assistant"] %}
{{- raise_exception("unknown role " + message.role + "; valid roles: system, user, assistant") }}
{%- endif %}
{{- "<|" + message.role + "|>" }}
{%- if message.role == "assistant" %}
{%- generation %}{{- message.content + eos_token }}{%- endgeneration %}
{%- else %}
{{- message.content + eos_token }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
{{- "<|assistant|>" }}
{%- endif %}
"""


def vocabulary(text: str) -> list[str]:
    """Return special tokens, ASCII characters as word starts and continuations, and words."""
    visible = [c for c in string.printable if c.isprintable() and not c.isspace()]
    characters = [c for c in visible if not c.isupper()]
    words = Counter(text.lower().replace(".", " ").replace(",", " ").split())
    ranked = sorted(words, key=lambda word: (-words[word], word))
    whole = [word for i, word in enumerate(ranked) if i < FREQUENT or zlib.crc32(word.encode()) % 4]
    pieces = [*characters, *(f"##{c}" for c in characters if c.isalnum())]
    return list(dict.fromkeys([*SPECIAL_TOKENS, *pieces, *whole]))


def build(vocab: list[str]) -> Tokenizer:
    """Return a tokenizer that makes `[CLS] A [SEP]` and `[CLS] A [SEP] B [SEP]`."""
    ids = {token: index for index, token in enumerate(vocab)}
    tokenizer = Tokenizer(WordPiece(ids, unk_token="[UNK]", max_input_chars_per_word=100))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.BertProcessing(
        ("[SEP]", ids["[SEP]"]), ("[CLS]", ids["[CLS]"])
    )
    tokenizer.decoder = decoders.WordPiece(prefix="##")
    tokenizer.add_special_tokens(list(SPECIAL_TOKENS))
    return tokenizer


def characters() -> PreTrainedTokenizerFast:
    """Return a tokenizer whose tokens are characters, with a chat template."""
    roles = [f"<|{role}|>" for role in ROLES]
    alphabet = ["\n", *sorted(c for c in string.printable if c.isprintable())]
    tokens = [*WRITER_TOKENS.values(), *roles, *alphabet]
    ids = {token: index for index, token in enumerate(tokens)}
    tokenizer = Tokenizer(WordLevel(ids, unk_token=WRITER_TOKENS["unk_token"]))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        **WRITER_TOKENS,
        extra_special_tokens=roles,
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
        padding_side="right",
    )


def main(folder: Path) -> None:
    """Write `tokenizer.json` and `characters/` into `folder`."""
    text = " ".join(f"{pair.premise} {pair.hypothesis}" for pair in generate("train"))
    folder.mkdir(parents=True, exist_ok=True)
    build(vocabulary(text)).save(str(folder / "tokenizer.json"))
    characters().save_pretrained(folder / "characters")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else FOLDER)
