"""Write the tokenizer of the tiny models: a lower-casing WordPiece for BERT-style pairs.

Usage: python scripts/make_tiny_tokenizer.py [OUTPUT]

The vocabulary is the special tokens, printable ASCII, and the words of the `train` split of
`nli_mini`: a word not among them is spelled. So is a quarter of the rarer words of that split, or
else the letters would never be trained, and unseen words would be noise. Each run gives the same
bytes, which the trainer of `tokenizers` does not.
"""

import string
import sys
import zlib
from collections import Counter
from pathlib import Path

from tokenizers import Tokenizer, decoders, normalizers, pre_tokenizers, processors
from tokenizers.models import WordPiece

from forgelm.tasks.nli_mini import generate

SPECIAL_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
FREQUENT = 30
OUTPUT = Path(__file__).parents[1] / "forgelm" / "models" / "tiny" / "tokenizer.json"


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


def main(output: Path) -> None:
    """Write the tokenizer to `output`, a `tokenizer.json`."""
    text = " ".join(f"{pair.premise} {pair.hypothesis}" for pair in generate("train"))
    output.parent.mkdir(parents=True, exist_ok=True)
    build(vocabulary(text)).save(str(output))


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else OUTPUT)
