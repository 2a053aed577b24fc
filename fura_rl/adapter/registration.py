"""Makes FuRA known to PEFT, which has no public way to add a method from outside.

PEFT, transformers and TRL look methods up by a member of the enum `PeftType` and read its `.value`, so a plain string
will not do: the enum has to grow a real member.
"""

from peft.utils import PeftType, register_peft_method

from ..errors import FuraError


def extend_peft_type(name: str) -> PeftType:
    """Returns the member `name` of PEFT's enum, which is created if it does not exist.

    A member built here behaves as one from PEFT's source: it pickles, deep-copies, compares with its string and shows
    up in iteration.
    """
    if name in PeftType.__members__:
        return PeftType[name]
    member = str.__new__(PeftType, name)
    member._name_ = name
    member._value_ = name
    member.__objclass__ = PeftType
    member._sort_order_ = len(PeftType._member_names_)
    type.__setattr__(PeftType, name, member)  # EnumType forbids the plain assignment
    PeftType._member_names_.append(name)
    PeftType._member_map_[name] = member
    PeftType._value2member_map_[name] = member
    return member


def register_fura(config_cls: type, model_cls: type) -> None:
    """Registers the method "fura" with PEFT; a second call with the same class does nothing.

    Raises:
        FuraError: if another package (or a later PEFT) has registered a FuRA of its own.
    """
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    registered = PEFT_TYPE_TO_CONFIG_MAPPING.get(PeftType["FURA"])
    if registered is config_cls:
        return
    if registered is not None:
        raise FuraError(
            f"PEFT already has a FURA method ({registered.__module__}.{registered.__qualname__}): fura-rl will not "
            "replace it. Use that one, or a version of PEFT without it."
        )
    register_peft_method(name="fura", config_cls=config_cls, model_cls=model_cls)
