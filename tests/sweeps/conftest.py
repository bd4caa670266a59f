from sweep_fixtures import sweep, words

__all__ = ["sweep", "words"]
