"""A tokenizer of transformers as a vocabulary. It must be one of the `tokenizers` library, which
encodes many texts at a time on all cores and says which characters a token stands for."""

import hashlib
import json
import os
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

from tokenizers import Encoding, Tokenizer
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from neighborlm.common.errors import InputError


class HuggingFaceVocabulary:
    """Maps text to ids and back as a tokenizer of transformers does.

    Args:
        tokenizer: of transformers.
        name: for messages.

    Attributes:
        pad: id that rows are padded with, the end token's where the tokenizer has none of its own.
        eos: id of the token that ends a document.
        window_start: id of the token that every text begins with, such as Gemma's <bos>; None
            where the tokenizer puts nothing in front.

    Raises:
        InputError: it is none of the `tokenizers` library, or has no tokens or no end token.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, name: str = "the tokenizer") -> None:
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if not isinstance(backend, Tokenizer):
            raise InputError(
                f"{name}: is a {type(tokenizer).__name__}, which the tokenizers library cannot "
                "run; expected one with a tokenizer.json"
            )
        if backend.get_vocab().keys() <= set(tokenizer.all_special_tokens):
            # What transformers makes of a config where there are no files of a tokenizer.
            raise InputError(
                f"{name}: has no tokenizer; expected a directory with a tokenizer.json, or a name "
                "on the Hugging Face hub"
            )
        end = tokenizer.eos_token_id
        if end is None:
            raise InputError(
                f"{name}: has no end token, by which documents are kept apart; expected an "
                "eos_token in its tokenizer_config.json"
            )
        self.tokenizer = tokenizer
        self.backend = backend
        self.backend.no_truncation()
        self.backend.no_padding()
        self.eos = end
        self.pad = end if tokenizer.pad_token_id is None else tokenizer.pad_token_id
        first = self.backend.encode("a").ids[0]
        self.window_start = first if first == tokenizer.bos_token_id else None

    @classmethod
    def load(cls, name: str, revision: str | None = None) -> "HuggingFaceVocabulary":
        """From a directory, or from transformers' own cache or hub by its name.

        Raises:
            InputError: there is none.
        """
        flag = f"--data.tokenizer {name}"
        path = Path(name).expanduser()
        if not path.is_dir() and (path.exists() or name[0] in "./~" or name.count("/") > 1):
            found = "a file" if path.exists() else "no such directory"
            raise InputError(f"{flag}: {found}; expected one with a tokenizer of transformers")
        try:
            tokenizer = AutoTokenizer.from_pretrained(name, revision=revision)
        except Exception as error:
            reason = " ".join(str(error).split()).split(". ")[0][:200]
            raise InputError(
                f"{flag}: transformers cannot read a tokenizer there ({reason}); expected a "
                "directory with a tokenizer.json, or a name on the Hugging Face hub"
            ) from error
        return cls(tokenizer, flag)

    def __len__(self) -> int:
        """One more than the largest id."""
        return self._size

    @cached_property
    def _size(self) -> int:
        return max(self.tokens.values()) + 1

    @property
    def tokens(self) -> dict[str, int]:
        """The id of each token, by what the tokenizer calls it."""
        return self.backend.get_vocab(with_added_tokens=True)

    @cached_property
    def fingerprint(self) -> str:
        """Identifies all that the tokenizer does, and the tokens that we put between texts."""
        content = json.loads(self.backend.to_str())
        content["ends"] = [self.pad, self.eos, self.window_start]
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]

    def encode(self, text: str) -> list[int]:
        """Ids of a text, without tokens in front of it or behind it."""
        return self.backend.encode(text, add_special_tokens=False).ids

    def encode_all(self, texts: Sequence[str], with_ends: bool = False) -> list[Encoding]:
        """What the tokenizer makes of texts, on all cores.

        Args:
            with_ends: with the tokens that it puts in front of a text and behind it.
        """
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
        return self.backend.encode_batch(list(texts), add_special_tokens=with_ends)

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ids, those of special tokens too."""
        return self.backend.decode(list(ids), skip_special_tokens=False)

    def decode_all(self, ids: Sequence[Sequence[int]]) -> list[str]:
        """Texts of lists of ids, on all cores."""
        return self.backend.decode_batch(list(ids), skip_special_tokens=False)

    def save(self, path: Path | str) -> None:
        """Writes the tokenizer as a directory `tokenizer` beside a dict.txt of this path."""
        self.tokenizer.save_pretrained(Path(path).with_name("tokenizer"))
