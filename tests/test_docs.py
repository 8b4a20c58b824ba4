"""The pages in docs/: what they tell people to type works, what they name exists, what they list is what is there."""

import re

import pytest

from tests import config_page
from tests.documented import PAGES, ROOT


def test_the_page_of_config_keys_is_that_of_the_schema() -> None:
    assert config_page.PAGE.read_text() == config_page.page(), "docs/config.md is not current: run `make docs`"


@pytest.mark.parametrize("page", sorted(PAGES))
def test_every_file_that_a_page_names_exists(page: str) -> None:
    names = set(re.findall(r"`((?:ml|configs|docs|tests|benchmarks)/[\w./-]+)`", PAGES[page]))
    assert [name for name in sorted(names) if not (ROOT / name).exists()] == []
