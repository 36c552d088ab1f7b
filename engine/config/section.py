"""What every key of a config shares: strictness, the number types, defaults, values for a file."""

from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field
from pydantic_core import PydanticCustomError


def _refuse_bool(value: object) -> object:
    """`lora_r: true` would be rank 1, because Python counts with True."""
    if isinstance(value, bool):
        raise PydanticCustomError("number_type", "not a number")
    return value


_number = BeforeValidator(_refuse_bool)

Whole = Annotated[int, Field(ge=0), _number]
"""A whole number that may be 0."""
Count = Annotated[int, Field(ge=1), _number]
Amount = Annotated[float, Field(ge=0), _number]
Positive = Annotated[float, Field(gt=0), _number]
Fraction = Annotated[float, Field(ge=0, le=1), _number]
Below1 = Annotated[float, Field(ge=0, lt=1), _number]


class Section(BaseModel):
    """Keys that belong together; every key says in its docstring what it does."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        use_attribute_docstrings=True,
        defer_build=True,
        allow_inf_nan=False,
        protected_namespaces=(),
    )

    def default_of(self, key: str) -> Any:
        """The default of `key` beside the other values here, which it may depend on."""
        field = type(self).model_fields[key]
        if field.is_required():
            return None
        return field.get_default(call_default_factory=True, validated_data=self.__dict__)

    def is_default(self, key: str) -> bool:
        """Whether a file need not name `key`."""
        return bool(getattr(self, key) == self.default_of(key))

    def file_value(self, key: str) -> Any:
        """The value of `key` as YAML has it: lists and mappings, None for an empty tuple."""
        value = getattr(self, key)
        if not isinstance(value, tuple):
            return value
        return [item.file_values() if isinstance(item, Section) else item for item in value] or None

    def file_values(self) -> dict[str, Any]:
        """What a file must name of this section."""
        return {
            key: self.file_value(key)
            for key in type(self).model_fields
            if key in self.always_written() or not self.is_default(key)
        }

    def always_written(self) -> tuple[str, ...]:
        """Keys that a file names even with their default."""
        return ()
