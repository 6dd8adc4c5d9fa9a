"""Readings: how delivered columns become the contract's types, value by value, null where a value has no reading."""

import polars as pl
import pyarrow as pa
from polars import selectors

UTC_US = pl.Datetime("us", "UTC")
_TRUTH = {"0": False, "1": True, "false": False, "true": True, "f": False, "t": True}
_MAX_MS = 2**63 // 1000 - 1
_NAIVE_FORMATS = ("%Y-%m-%d %H:%M:%S%.f", "%Y-%m-%dT%H:%M:%S%.f")


def frame(table: pa.Table) -> pl.DataFrame:
    """An arrow table as polars."""
    made = pl.from_arrow(table)
    assert isinstance(made, pl.DataFrame)
    return made


def as_json(rows: pl.DataFrame, columns: list[str]) -> pl.Series:
    """Each row's columns as JSON text, bytes in hex: for people to read, and to compare rows that hold lists."""
    if not rows.height:  # polars cannot encode nothing
        return pl.Series([], dtype=pl.String)
    instants = [_shown(n, rows.schema[n]) for n in columns if isinstance(rows.schema[n], pl.Datetime)]
    shown = rows.select(columns).with_columns(selectors.binary().bin.encode("hex"), *instants)
    return shown.select(pl.struct(columns).struct.json_encode()).to_series()


def _shown(name: str, kind: pl.DataType) -> pl.Expr:
    """An instant as text; one beyond the year 9999, which polars cannot write, as its bare number."""
    assert isinstance(kind, pl.Datetime)
    number, per_second = pl.col(name).cast(pl.Int64), {"ms": 10**3, "us": 10**6, "ns": 10**9}[kind.time_unit]
    writable = (number // per_second).is_between(-62_135_596_800, 253_402_300_799)
    return pl.coalesce(pl.when(writable).then(pl.col(name)).dt.to_string("iso"), number.cast(pl.String)).alias(name)


def delivered(name: str, column: pa.ChunkedArray) -> pl.Series:
    """An arrow column as polars; NaN becomes null, because that is how pandas writes null.

    A column of a type from which no contract column can be read, as a struct or a time of day, becomes lists that
    hold the type's name: it has no reading either, and the quarantine shows why.
    """
    kind = column.type
    try:
        if pa.types.is_dictionary(kind):
            column = column.cast(kind.value_type)
        if pa.types.is_timestamp(kind) and kind.unit == "s":
            column = column.cast(pa.timestamp("ms", kind.tz))
        if pa.types.is_decimal(kind):
            column = column.cast(pa.float64())
        column = _valid_text(column)
        if _readable(column.type):
            values = pl.from_arrow(column)
            assert isinstance(values, pl.Series)
            return (values.fill_nan(None) if values.dtype.is_float() else values).alias(name)
    except pa.ArrowException:
        pass  # as seconds beyond the range of milliseconds
    shown = [None if null else [f"<{kind}>"] for null in column.is_null().to_pylist()]
    return pl.Series(name, shown, pl.List(pl.String))


def _valid_text(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """The column itself, or as bytes where its text is no UTF-8: Parquet does not check, polars and Python do."""
    try:
        column.validate(full=True)
    except pa.ArrowInvalid:
        return column.cast(pa.binary())
    return column


def _readable(kind: pa.DataType) -> bool:
    of = pa.types
    if of.is_list(kind) or of.is_large_list(kind) or of.is_fixed_size_list(kind):
        return not of.is_nested(kind.value_type) and _readable(kind.value_type)
    text = of.is_string(kind) or of.is_large_string(kind) or of.is_string_view(kind)
    raw = of.is_binary(kind) or of.is_large_binary(kind)
    number = of.is_integer(kind) or of.is_floating(kind) or of.is_boolean(kind)
    return text or raw or number or of.is_timestamp(kind) or of.is_date32(kind) or of.is_null(kind)


def reading(values: pl.Series, kind: pa.DataType) -> pl.Series:
    """The values as a stored type."""
    if pa.types.is_string(kind):
        return _text(values)
    if pa.types.is_timestamp(kind):
        return _instant(values)
    if pa.types.is_boolean(kind):
        return _truth(values)
    if pa.types.is_int16(kind):
        return _whole(values).cast(pl.Int16, strict=False)
    if pa.types.is_float64(kind):
        if values.dtype.is_nested() or values.dtype.is_temporal():
            return _nothing(values, pl.Float64)
        return values.cast(pl.Float64, strict=False).fill_nan(None)
    inner = pl.String if pa.types.is_string(kind.value_type) else pl.Float32
    if values.dtype == pl.Null or isinstance(values.dtype, (pl.List, pl.Array)):
        return values.cast(pl.List(inner), strict=False)
    return _nothing(values, pl.List(inner))


def _nothing(values: pl.Series, kind: pl.DataType | type[pl.DataType]) -> pl.Series:
    return pl.Series(values.name, [None], kind).new_from_index(0, len(values))


def _text(values: pl.Series) -> pl.Series:
    kind = values.dtype
    if kind == pl.String:
        return values
    if kind.is_float():  # ids that met a null on their way through pandas: 7.0 is "7"
        return _whole(values).cast(pl.String)
    if kind.is_integer() or kind in (pl.Null, pl.Boolean):
        return values.cast(pl.String)
    if kind == pl.Binary:  # text that a writer did not mark as text
        return pl.Series(values.name, [_utf8(v) for v in values], pl.String)
    return _nothing(values, pl.String)


def _utf8(value: bytes | None) -> str | None:
    try:
        return None if value is None else value.decode()
    except UnicodeDecodeError:
        return None


def _whole(values: pl.Series) -> pl.Series:
    if values.dtype.is_integer() or values.dtype in (pl.String, pl.Null):
        return values.cast(pl.Int64, strict=False)
    if values.dtype.is_float():
        whole = values.cast(pl.Int64, strict=False)
        return whole.set(whole.cast(pl.Float64) != values.cast(pl.Float64), None)
    return _nothing(values, pl.Int64)


def _truth(values: pl.Series) -> pl.Series:
    if values.dtype == pl.Boolean:
        return values
    if values.dtype == pl.String:
        lower = values.str.strip_chars().str.to_lowercase()
        return lower.replace_strict(_TRUTH, default=None, return_dtype=pl.Boolean)
    if values.dtype.is_numeric():
        return (values == 1).set((values != 0) & (values != 1), None)
    return _nothing(values, pl.Boolean)


def _instant(values: pl.Series) -> pl.Series:
    """Instants in UTC; text in ISO 8601; without a zone taken as UTC. Bare numbers have no unit, so no reading."""
    kind = values.dtype
    if isinstance(kind, pl.Datetime):
        if kind.time_unit == "ms":  # polars would wrap around: nanoseconds that pose as milliseconds, say
            values = values.set(values.dt.timestamp("ms").abs() > _MAX_MS, None)
        utc = values.dt.convert_time_zone("UTC") if kind.time_zone else values.dt.replace_time_zone("UTC")
        return utc.dt.cast_time_unit("us")
    if kind == pl.Date:
        return values.cast(pl.Datetime("us")).dt.replace_time_zone("UTC")
    if kind == pl.String:
        text = pl.col(values.name).str
        naive = [text.to_datetime(f, time_unit="us", strict=False) for f in _NAIVE_FORMATS]
        instants = [text.to_datetime(f"{f}%#z", time_unit="us", time_zone="UTC", strict=False) for f in _NAIVE_FORMATS]
        days = text.to_date("%Y-%m-%d", strict=False).cast(pl.Datetime("us"))
        read = pl.coalesce(*instants, *(n.dt.replace_time_zone("UTC") for n in [*naive, days]))
        return values.to_frame().select(read).to_series().cast(UTC_US)
    return _nothing(values, UTC_US)
