"""A page that shows what memories do: one HTML file of a part of a text, with what the model and
each memory say of every token.

`looking` asks the memories of an evaluation about the tokens of a page, `reading` those of a
generated text, and `kept` reads them from a cache; all give `PageTokens`, which `writing` makes a
file of. What the file does when it is open is in the files `*.js`, of which `page.js` is the last.
"""

from neighborlm.programs.page.kept import compared_with_cache, kept_tokens
from neighborlm.programs.page.looking import page_of
from neighborlm.programs.page.reading import page_of_text
from neighborlm.programs.page.tokens import check_choice, compared_with_scores
from neighborlm.programs.page.writing import write_page

__all__ = [
    "check_choice",
    "compared_with_cache",
    "compared_with_scores",
    "kept_tokens",
    "page_of",
    "page_of_text",
    "write_page",
]
