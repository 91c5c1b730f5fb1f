"""ArviZ, imported where it is needed."""

import warnings
from types import ModuleType


def import_arviz() -> ModuleType:
    """Return the module ``arviz``, imported without the notice that its version 0.23 gives once a day."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", r"\s*ArviZ is undergoing a major refactor", FutureWarning)
        import arviz
    module: ModuleType = arviz
    return module
