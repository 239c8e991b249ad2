"""The fixtures of the rooms beneath this one and beside it."""

from tests.core.columns.conftest import decoder_directory

__all__ = ["decoder_directory"]
