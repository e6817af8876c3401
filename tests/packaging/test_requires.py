"""Which versions of other packages are refused, and where nobody knows what is supported."""

from importlib import metadata

import pytest

from seqpar import requires

LINES = [
    "einops>=0.8",
    "torch<2.15,>=2.11",
    "triton>=3.6; sys_platform == 'linux'",
    "transformers<6,>=5.17; extra == 'dev'",
    "transformers<6,>=5.17; extra == 'transformers'",
]


@pytest.fixture
def installed(monkeypatch):
    """Versions by package, to be changed."""
    versions = {"einops": "0.8.2", "torch": "2.13.0+cpu", "transformers": "5.24.0"}
    monkeypatch.setattr(metadata, "requires", lambda _: LINES)
    monkeypatch.setattr(metadata, "version", lambda name: versions[name])
    monkeypatch.setattr(requires, "find_spec", versions.get)
    return versions


def needs_transformers():
    requires.require("transformers", by="x", extra="transformers")


@pytest.mark.usefixtures("installed")
def test_what_is_within_its_range_is_let_in():
    requires.require_dependencies()
    needs_transformers()


def test_a_dependency_that_is_missing_is_named_with_its_command(installed):
    del installed["einops"]
    with pytest.raises(
        ModuleNotFoundError, match=r"^seqpar needs einops>=0.8, which is not .* pip"
    ) as info:
        requires.require_dependencies()
    assert str(info.value).endswith(": pip install 'einops>=0.8'")
    assert info.value.name == "einops"


def test_a_dependency_may_be_newer_than_was_tested_but_not_older(installed):
    installed["torch"] = "2.16.0.dev20261126"
    requires.require_dependencies()
    installed["torch"] = "2.10.2"
    with pytest.raises(
        ImportError, match=r"^seqpar needs torch>=2.11, got torch 2.10.2: pip install"
    ):
        requires.require_dependencies()


@pytest.mark.parametrize("version", ["5.16.1", "6.0.0", "6.0.0rc1", "4.57.0"])
def test_what_is_optional_must_be_within_both_ends(installed, version):
    installed["transformers"] = version
    says = rf"^x needs transformers>=5.17,<6, got transformers {version}: pip install 'seqpar.trans"
    with pytest.raises(ImportError, match=says):
        needs_transformers()


def test_without_metadata_of_seqpar_any_version_will_do_but_none_will_not(installed, monkeypatch):
    def unknown(name):
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "requires", unknown)
    installed |= {"torch": "1.0", "transformers": "1.0"}
    requires.require_dependencies()
    needs_transformers()
    del installed["transformers"]
    with pytest.raises(ModuleNotFoundError, match=r"^x needs transformers, which is not installed"):
        needs_transformers()


@pytest.mark.usefixtures("installed")
def test_what_is_importable_and_has_no_version_is_let_in(monkeypatch):
    def unknown(name):
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "version", unknown)
    needs_transformers()


@pytest.mark.parametrize(
    ("version", "bounds", "is_within"),
    [
        ("2.11", ">=2.11.0", True),
        ("2.11.0a0+git1", ">=2.11", True),
        ("2.9", ">=2.11", False),
        ("3", "<3.0", False),
        ("2.99.1", "<3,>=2.11", True),
        ("1!2.0", "", True),
    ],
)
def test_versions_are_compared_by_their_numbers(version, bounds, is_within):
    assert requires.is_within(version, bounds) == is_within
