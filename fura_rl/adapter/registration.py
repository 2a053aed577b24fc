"""Makes FuRA known to PEFT, which has no public way to add a method from outside.

PEFT, transformers and TRL look methods up by a member of the enum `PeftType` and read its `.value`, so a plain string
will not do: the enum has to grow a real member.
"""

from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.utils import PeftType, register_peft_method

from ..errors import FuraError
from .enum_member import extend_str_enum


def fura_peft_type() -> PeftType:
    """The member `PeftType.FURA`."""
    member = extend_str_enum(PeftType, "FURA")
    assert isinstance(member, PeftType)
    return member


def register_fura(config_cls: type, model_cls: type) -> None:
    """Registers the method "fura" with PEFT; a second call with the same class does nothing.

    Raises:
        FuraError: if another package (or a later PEFT) has registered a FuRA of its own.
    """
    registered = PEFT_TYPE_TO_CONFIG_MAPPING.get(fura_peft_type())
    if registered is config_cls:
        return
    if registered is not None:
        raise FuraError(
            f"PEFT already has a FURA method ({registered.__module__}.{registered.__qualname__}): fura-rl will not "
            "replace it. Use that one, or a version of PEFT without it."
        )
    register_peft_method(name="fura", config_cls=config_cls, model_cls=model_cls)
