"""`check_plain`: attention whose masks and scores a model is going to say."""

from seqpar.module import Attention


def check_plain(attend: Attention) -> None:
    """Refuses attention that says itself what the layers of a model say.

    Raises:
        ValueError: it has a mask, score or dropout.
    """
    plain = type(attend.score)()
    has_score = any(
        getattr(attend.score, name) is not getattr(plain, name)
        for name in ("scale", "softcap", "alibi_slopes", "sinks")
    )
    if attend.mask != type(attend.mask)() or has_score or attend.dropout is not None:
        raise ValueError(
            f"mask, score and dropout come from the layers of the model, got {attend}; leave them out"
        )
