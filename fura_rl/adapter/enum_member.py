"""Adding a member to an enum of another package. Standard library only, so that it can be tried on any Python."""

from enum import Enum


def extend_str_enum(enum_cls: type[Enum], name: str) -> Enum:
    """Returns the member `name` of `enum_cls` (a `str` enum whose values equal its names), created if missing.

    A member built here behaves as one from the enum's source: it pickles, deep-copies, hashes and compares as its
    string, and shows up in iteration. Python has no public way to do this; checked on 3.11, 3.12 and 3.13.
    """
    if name in enum_cls.__members__:
        return enum_cls[name]
    member = str.__new__(enum_cls, name)  # type: ignore[type-var]
    for attribute, value in {
        "_name_": name,
        "_value_": name,
        "__objclass__": enum_cls,
        "_sort_order_": len(enum_cls._member_names_),
    }.items():
        setattr(member, attribute, value)
    type.__setattr__(enum_cls, name, member)  # EnumType itself forbids assigning members
    enum_cls._member_names_.append(name)
    enum_cls._member_map_[name] = member
    enum_cls._value2member_map_[name] = member
    return member
