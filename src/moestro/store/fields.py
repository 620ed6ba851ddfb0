"""Typed access to parsed JSON: every field is checked when it is read, and named when it is not as expected."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from moestro.errors import StoreError


class Fields:
    """A JSON object or array whose members are read with a stated type. `where` names it in messages.

    Raises:
        StoreError: from every method, when the member is missing or of another type.
    """

    def __init__(self, values: dict[str, Any] | list[Any], where: str) -> None:
        self._values: Any = values
        self._where = where

    def text(self, key: str | int) -> str:
        """A string."""
        value = self._get(key)
        if not isinstance(value, str):
            raise self._wrong(key, "text", value)
        return value

    def text_or_none(self, key: str) -> str | None:
        """A string or null."""
        return None if self._get(key) is None else self.text(key)

    def file_name(self, key: str) -> str:
        """A plain file name: it cannot lead out of the folder."""
        value = self.text(key)
        if value in ("", ".", "..") or "/" in value or "\\" in value or "\0" in value:
            raise self._wrong(key, "a plain file name", value)
        return value

    def size(self, key: str | int) -> int:
        """A whole number that is not negative and fits 63 bits."""
        value = self._get(key)
        if type(value) is not int or not 0 <= value < 2**63:
            raise self._wrong(key, "a whole number", value)
        return value

    def checksum_or_none(self, key: str) -> int | None:
        """A checksum or null."""
        return None if self._get(key) is None else self.checksum(key)

    def size_or_none(self, key: str) -> int | None:
        """A whole number or null."""
        return None if self._get(key) is None else self.size(key)

    def number(self, key: str | int) -> float:
        """A number that is written with a point or an exponent, finite and not negative."""
        value = self._get(key)
        if type(value) is not float or not 0.0 <= value < float("inf"):
            raise self._wrong(key, "a number", value)
        return value

    def checksum(self, key: str | int) -> int:
        """A checksum of 16 lower-case hex digits."""
        value = self.text(key)
        if len(value) != 16 or any(digit not in "0123456789abcdef" for digit in value):
            raise self._wrong(key, "16 hex digits", value)
        return int(value, 16)

    def sizes(self, key: str | int) -> tuple[int, ...]:
        """An array of whole numbers."""
        items = Fields(self._array(key), f"{key} of {self._where}")
        return tuple(items.size(index) for index in range(len(items._values)))

    def sizes_or_none(self, key: str) -> tuple[int, ...] | None:
        """An array of whole numbers, or null."""
        return None if self._get(key) is None else self.sizes(key)

    def numbers(self, key: str | int) -> tuple[float, ...]:
        """An array of numbers."""
        items = Fields(self._array(key), f"{key} of {self._where}")
        return tuple(items.number(index) for index in range(len(items._values)))

    def numbers_or_none(self, key: str) -> tuple[float, ...] | None:
        """An array of numbers, or null."""
        return None if self._get(key) is None else self.numbers(key)

    def number_tables(self, key: str) -> tuple[tuple[tuple[float, ...], ...], ...]:
        """An array of arrays of arrays of numbers."""
        tables = Fields(self._array(key), f"{key} of {self._where}")
        return tuple(
            tuple(rows.numbers(index) for index in range(len(rows._values)))
            for rows in (
                Fields(tables._array(place), f"{place} of {key} of {self._where}")
                for place in range(len(tables._values))
            )
        )

    def texts(self, key: str) -> tuple[str, ...]:
        """An array of strings."""
        items = Fields(self._array(key), f"{key} of {self._where}")
        return tuple(items.text(index) for index in range(len(items._values)))

    def raw_object(self, key: str) -> dict[str, Any]:
        """An object of any content."""
        value = self._get(key)
        if not isinstance(value, dict):
            raise self._wrong(key, "an object", value)
        return value

    def object(self, key: str) -> Fields:
        """An object."""
        return Fields(self.raw_object(key), f"{key} of {self._where}")

    def object_or_none(self, key: str) -> Fields | None:
        """An object or null."""
        return None if self._get(key) is None else self.object(key)

    def objects(self, key: str) -> Iterator[Fields]:
        """An array of objects."""
        for index, value in enumerate(self._array(key)):
            if not isinstance(value, dict):
                raise self._wrong(key, "an array of objects", value)
            yield Fields(value, f"{key}[{index}] of {self._where}")

    def objects_or_nulls(self, key: str) -> Iterator[Fields | None]:
        """An array whose members are objects or null."""
        for index, value in enumerate(self._array(key)):
            if value is not None and not isinstance(value, dict):
                raise self._wrong(key, "an array of objects and nulls", value)
            yield None if value is None else Fields(value, f"{key}[{index}] of {self._where}")

    def rows(self, key: str, *, columns: int) -> Iterator[Fields]:
        """An array of arrays with `columns` members each."""
        for index, value in enumerate(self._array(key)):
            yield self._row(key, index, value, columns)

    def named_rows(self, key: str, *, columns: int) -> Iterator[tuple[str, Fields]]:
        """An object whose members are arrays with `columns` members each."""
        for name, value in self.raw_object(key).items():
            yield name, self._row(key, name, value, columns)

    def _row(self, key: str, index: str | int, value: Any, columns: int) -> Fields:
        if not isinstance(value, list) or len(value) != columns:
            raise self._wrong(key, f"rows of {columns}", value)
        return Fields(value, f"{key}[{index}] of {self._where}")

    def _array(self, key: str | int) -> list[Any]:
        value = self._get(key)
        if not isinstance(value, list):
            raise self._wrong(key, "an array", value)
        return value

    def _get(self, key: str | int) -> Any:
        try:
            return self._values[key]
        except (KeyError, IndexError):
            raise StoreError(f"{self._where} has no {key!r}") from None

    def _wrong(self, key: str | int, expected: str, value: Any) -> StoreError:
        return StoreError(f"{key!r} of {self._where} is {value!r:.60}, expected {expected}")
