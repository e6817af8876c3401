"""Which warnings fail a test: those of this project's own code, and any that is no deprecation."""

import warnings

import pytest


def warn_from(module, category):
    warnings.warn_explicit("of a test", category, f"{module}.py", 1, module=module)


@pytest.mark.parametrize("category", [DeprecationWarning, FutureWarning, PendingDeprecationWarning])
def test_a_deprecation_fails_where_our_code_calls_what_is_deprecated(category):
    for module in (
        "seqpar.comm.ring_pass",
        "seqpar_kernels.band",
        "tests.layout.test_layout",
        "byte_lm.loop",
    ):
        with pytest.raises(category):
            warn_from(module, category)


@pytest.mark.filterwarnings("ignore:of a test")
def test_other_packages_may_deprecate_among_themselves():
    warn_from("transformers.models.llama", FutureWarning)


def test_any_other_warning_fails():
    with pytest.raises(UserWarning):
        warn_from("transformers.models.llama", UserWarning)
