"""Few names, loaded when first used."""

from __future__ import annotations

import subprocess
import sys

import pytest

import trimtab


def test_all_is_what_can_be_loaded() -> None:
    assert set(trimtab.__all__) == set(trimtab._HOMES)
    assert len(trimtab.__all__) == len(set(trimtab.__all__))
    assert set(trimtab.__all__) <= set(dir(trimtab))


@pytest.mark.parametrize("name", trimtab.__all__)
def test_every_name_loads_from_its_home(name: str) -> None:
    thing = getattr(trimtab, name)
    assert thing.__name__ == name
    assert thing.__module__ == trimtab._HOMES[name]


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'allign'"):
        trimtab.allign  # noqa: B018


def test_functions_are_not_shadowed_by_modules_once_these_are_imported() -> None:
    import trimtab.evaluation.run
    import trimtab.softtoken.align

    assert callable(trimtab.align)
    assert callable(trimtab.evaluate)


def test_importing_costs_nothing() -> None:
    heavy = "{'torch', 'transformers', 'matplotlib', 'pydantic'} & set(sys.modules)"
    code = f"import sys, trimtab; dir(trimtab); print(trimtab.__version__, {heavy})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == [trimtab.__version__, "set()"]
