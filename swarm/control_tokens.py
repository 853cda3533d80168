"""Special tokens in what people write are plain text; those that a chat template writes are tokens.

A tokenizer first takes special tokens out of a text, whoever wrote them. So each one that stands in a person's text
gets a mark inside. The tokenizer removes the marks after it has taken out the special tokens, and before it looks for
words: what was marked becomes the tokens of its characters, in its place, as if there were no such special token. Texts
without special tokens become the same tokens as ever.
"""

import contextlib
import re
from collections.abc import Iterable, Iterator, Sequence

from jinja2 import TemplateError
from tokenizers import Tokenizer, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerBase

# Two noncharacters, which stand in no text that is meant for others (Unicode Standard, 23.7).
MARK = "\ufdd0\ufdd1"
# What becomes ``MARK`` when the mark in it is removed.
ESCAPED = MARK[0] + MARK + MARK[1]


class ControlTokens:
    """What is a token of control in texts of a model, and a character wherever a person writes it."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, backend: Tokenizer) -> None:
        """Let ``backend`` remove marks.

        :param tokenizer: says which tokens are special, and what its chat template writes
        :raises ValueError: if it spells one of them with the token itself, marked or not
        """
        special = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
        every = [*special, *written_by_templates(tokenizer)]
        # Blank ones are words of a text, and those of one character cannot be marked.
        self.tokens = [token for token in dict.fromkeys(every) if len(token) > 1 and not token.isspace()]
        self._special = [token for token in self.tokens if token in special]
        self._any_begins, self._special_begins = beginnings(self.tokens), beginnings(self._special)
        self._unknown = tokenizer.unk_token  # which any characters may become
        self._normalizer = backend.normalizer
        self._removed_early = True
        remove = normalizers.Replace(MARK, "")
        backend.normalizer = normalizers.Sequence([remove, *([self._normalizer] if self._normalizer else [])])
        if self._still_tokens(backend):
            self._remove_late(backend)
        if found := self._still_tokens(backend):
            raise ValueError(f"its tokenizer cannot spell {found[0]!r} as plain text")

    def _remove_late(self, backend: Tokenizer) -> None:
        """Let marks stay until the text is cut into words, and cut it: for tokens that are looked for in the normalized
        text, or are words of the vocabulary."""
        self._removed_early = False
        backend.normalizer = self._normalizer
        cut = pre_tokenizers.Split(MARK, "removed")
        words = backend.pre_tokenizer
        backend.pre_tokenizer = pre_tokenizers.Sequence([cut, *([words] if words else [])])

    def _still_tokens(self, backend: Tokenizer) -> Sequence[str]:
        """Return those that are tokens even if they are marked."""
        encodings = backend.encode_batch([self.mark(token) for token in self.tokens], add_special_tokens=False)
        return [
            token
            for token, encoding in zip(self.tokens, encodings, strict=True)
            if token != self._unknown and backend.token_to_id(token) in encoding.ids
        ]

    def escape(self, text: str) -> str:
        """Return a text that is the same once marks are removed."""
        return text.replace(MARK, ESCAPED) if self._removed_early else text

    def mark(self, text: str, *, own: bool = False) -> str:
        """Return what a person has written with marks in all tokens of control.

        :param own: the model has written it: its thinking and its calls of tools, whose tokens are not special, stay
        """
        tokens, begins = (self._special, self._special_begins) if own else (self.tokens, self._any_begins)
        if begins is None:
            return self.escape(text)
        marked = begins.sub(rf"\g<0>{MARK}", self.escape(text))
        if not self._removed_early and self._normalizer is not None:
            # Other characters may become those of a token.
            normalize = self._normalizer.normalize_str
            folded = normalize(marked)
            if any(token in folded or normalize(token) in folded for token in tokens):
                return MARK.join(text)
        return marked


def written_by_templates(tokenizer: PreTrainedTokenizerBase) -> Iterator[str]:
    """Yield the tokens, special or not, that the chat templates of a tokenizer write."""
    found = tokenizer.chat_template
    for template in found.values() if isinstance(found, dict) else [found or ""]:
        with contextlib.suppress(TemplateError):  # whoever chats is told what is wrong with it
            yield from tokenizer._get_control_tokens(template)


def unmark(text: str) -> str:
    """Return a text as the model reads it, without marks."""
    return text.replace(MARK, "")


def beginnings(tokens: Iterable[str]) -> re.Pattern[str] | None:
    """Return a pattern of each first character of a token, even of one inside another; None if there are no tokens."""
    rests: dict[str, list[str]] = {}
    for token in tokens:
        rests.setdefault(token[0], []).append(token[1:])
    branches = [f"{re.escape(first)}(?={any_of(found)})" for first, found in rests.items()]
    return re.compile("|".join(branches)) if branches else None


def any_of(words: Sequence[str]) -> str:
    """Return a pattern of any of the words, each letter of which is looked at once, however many there are."""
    if not all(words):
        return ""
    rests: dict[str, list[str]] = {}
    for word in words:
        rests.setdefault(word[0], []).append(word[1:])
    branches = [re.escape(first) + any_of(found) for first, found in rests.items()]
    return branches[0] if len(branches) == 1 else f"(?:{'|'.join(branches)})"
