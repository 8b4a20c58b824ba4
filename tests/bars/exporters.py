"""One simulated market as each program exports it, and files as people send them.

The market trades around the clock, in bars of five minutes, over the ends of daylight saving in Athens and in New York
in 2024, with two gaps. Each function writes one file, as that program writes it, and returns its path.
"""

import csv
import gzip
import io
import json
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from zoneinfo import ZoneInfo

import numpy as np
import pyarrow as pa
from pyarrow import feather, parquet

from ctxtrain.bars.structure import Bars
from ctxtrain.synthetic.bars import SYMBOLS, simulate

LENGTH = 5  # minutes
START = datetime(2024, 10, 25, 20, tzinfo=UTC)
GAPS = ((400, 437), (1500, 1506))  # bars that are left out
COUNT = 2_700


def make_market(count: int = COUNT, seed: int = 5) -> Bars:
    """Prices, volume and the UTC open of each bar as `when` (Python datetimes)."""
    bars = simulate(np.random.default_rng(seed), count, SYMBOLS[2])
    kept = np.ones(count, bool)
    for first, stop in GAPS:
        kept[first:stop] = False
    market = {name: bars[name][kept] for name in ("open", "high", "low", "close", "volume", "buy_vol")}
    times = [START + timedelta(minutes=LENGTH * n) for n in range(count)]
    market["when"] = np.array(times, dtype=object)[kept]
    return market


def rows(market: Bars) -> list[tuple[datetime, float, float, float, float, int]]:
    return list(
        zip(*(market[name].tolist() for name in ("when", "open", "high", "low", "close", "volume")), strict=True)
    )


def milliseconds(when: datetime) -> int:
    return round(when.timestamp()) * 1000


def freqtrade_feather(folder: Path, market: Bars) -> Path:
    path = folder / "GC_USD-5m.feather"
    feather.write_feather(_freqtrade_table(market), path, compression="lz4")
    return path


def freqtrade_parquet(folder: Path, market: Bars) -> Path:
    path = folder / "GC_USD-5m.parquet"
    parquet.write_table(_freqtrade_table(market), path)
    return path


def _freqtrade_table(market: Bars) -> pa.Table:
    dates = pa.array([milliseconds(when) for when in market["when"]], pa.int64()).cast(pa.timestamp("ms", "UTC"))
    prices = {name: market[name].astype(float) for name in ("open", "high", "low", "close", "volume")}
    return pa.table({"date": dates, **prices})


def freqtrade_json(folder: Path, market: Bars) -> Path:
    path = folder / "GC_USD-5m.json.gz"
    content = [[milliseconds(when), *prices, float(volume)] for when, *prices, volume in rows(market)]
    path.write_bytes(gzip.compress(json.dumps(content).encode()))
    return path


def tradingview(folder: Path, market: Bars) -> Path:
    """ISO times of the exchange, whose offset changes, and columns of indicators."""
    path = folder / "COMEX_GC1!, 5.csv"
    zone = ZoneInfo("America/New_York")
    with path.open("w", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(["time", "open", "high", "low", "close", "Volume", "MA", "MA", "Plot"])
        for when, *prices, volume in rows(market):
            writer.writerow([when.astimezone(zone).isoformat(), *prices, volume, "NaN", prices[-1], ""])
    return path


def tradingview_epoch(folder: Path, market: Bars) -> Path:
    path = folder / "COMEX_GC1!, 5_a1b2c.csv"
    lines = ["time,open,high,low,close,Volume"]
    lines += [f"{milliseconds(when) // 1000},{','.join(map(str, rest))}" for when, *rest in rows(market)]
    path.write_text("\n".join(lines))
    return path


def metatrader(folder: Path, market: Bars, encoding: str = "utf-8") -> Path:
    """Server time of a broker in Athens; currencies have tick volumes only."""
    path = folder / f"GC_M5_202410252300_202411040700_{encoding}.csv"
    zone = ZoneInfo("Europe/Athens")
    heads = ("DATE", "TIME", "OPEN", "HIGH", "LOW", "CLOSE", "TICKVOL", "VOL", "SPREAD")
    lines = ["\t".join(f"<{head}>" for head in heads)]
    for when, *prices, volume in rows(market):
        local = when.astimezone(zone)
        texts = [f"{price:.2f}" for price in prices]
        lines.append("\t".join([f"{local:%Y.%m.%d}", f"{local:%H:%M:%S}", *texts, str(volume), "0", "12"]))
    path.write_text("\r\n".join(lines) + "\r\n", encoding=encoding)
    return path


def binance(folder: Path, market: Bars, per_second: int = 1_000_000, header: str = "") -> Path:
    """Twelve columns without names, spot files since 2025 in microseconds."""
    path = folder / f"GCUSDT-5m-2024-1{per_second // 1_000_000}.csv"
    lines = [header] if header else []
    lines += [",".join(map(str, line)) for line in _klines(market, per_second)]
    path.write_text("\n".join(lines) + "\n")
    return path


def _klines(market: Bars, per_second: int) -> list[list[Any]]:
    lines = []
    for (when, *prices, volume), buying in zip(rows(market), market["buy_vol"].tolist(), strict=True):
        opened = milliseconds(when) // 1000 * per_second
        closed = opened + LENGTH * 60 * per_second - 1
        texts = [f"{price:.8f}" for price in prices]
        lines.append([opened, *texts, f"{volume:.8f}", closed, "1.00000000", 7, f"{buying:.8f}", "0.50000000", 0])
    return lines


def binance_api(folder: Path, market: Bars) -> Path:
    """The answer of the API: numbers as text."""
    path = folder / "GCUSDT.json"
    path.write_text(json.dumps(_klines(market, 1000)))
    return path


def ninjatrader(folder: Path, market: Bars) -> Path:
    """UTC, stamped at the close of the bar."""
    path = folder / "GC 12-24.Last.txt"
    lines = []
    for when, *prices, volume in rows(market):
        closed = when + timedelta(minutes=LENGTH)
        lines.append(f"{closed:%Y%m%d %H%M%S};{';'.join(f'{price:.1f}' for price in prices)};{volume}")
    path.write_text("\r\n".join(lines) + "\r\n")
    return path


def interactive_brokers(folder: Path, market: Bars, zone: str = "US/Eastern", *, named: bool = True) -> Path:
    """As pandas saves the bars of the API: an index, and the average and number of trades of a bar."""
    path = folder / f"GC{'' if named else ' plain'}.csv"
    lines = [",date,open,high,low,close,volume,average,barCount"]
    for number, (when, *prices, volume) in enumerate(rows(market)):
        local = when.astimezone(ZoneInfo(zone))
        text = f"{local:%Y%m%d %H:%M:%S} {zone}" if named else f"{local:%Y%m%d  %H:%M:%S}"
        lines.append(f"{number},{text},{','.join(map(str, prices))},{volume}.0,{prices[0]},{volume // 3}")
    path.write_text("\n".join(lines) + "\n")
    return path


def excel(folder: Path, market: Bars) -> Path:
    """A German copy out of a spreadsheet: newest first, day first, points as separators of thousands."""
    path = folder / "Gold.csv"
    buffer = io.StringIO("sep=;\r\n")
    buffer.seek(0, io.SEEK_END)
    buffer.write("Tid;Öppning;Högst;Lägst;Senast;Volym\r\n")
    for when, *prices, volume in reversed(rows(market)):
        texts = [f"{price:,.2f}".replace(",", "x").replace(".", ",").replace("x", ".") for price in prices]
        buffer.write(f"{when:%d.%m.%Y %H:%M};{';'.join(texts)};{volume:,}\r\n".replace(f";{volume:,}", f";{volume}"))
    path.write_bytes(buffer.getvalue().encode("cp1252"))
    return path


EXCEL_COLUMNS = {
    "time": "Tid", "open": "Öppning", "high": "Högst", "low": "Lägst", "close": "Senast", "volume": "Volym",
}  # fmt: skip


def nested_export(folder: Path, market: Bars) -> Path:
    """One object per line, from an exporter inside NinjaTrader: stamped at the close, with the M5 context nested."""
    path = folder / "enhanced_GC 12-24_M5_20241025.jsonl"
    lines = []
    for number, (when, *prices, volume) in enumerate(rows(market)):
        stamp = (when + timedelta(minutes=LENGTH)).strftime("%Y-%m-%dT%H:%M:%S.000Z")
        opened, high, low, close = prices
        up = number % 3 == 0
        stats = {"total_volume": volume, "delta_close": number % 7 - 3, "cum_delta": -281}
        bar = {
            "o": opened, "h": high, "l": low, "c": close, "ext_dir": -1, "int_dir": 1, "ext_bos_up": number % 50 == 0,
            "ext_bos_down": False, "fvg_active": True, "fvg_type": "bullish" if up else "bearish",
            "price_action": {"is_doji": False}, "volume_stats": stats,
        }  # fmt: skip
        context = {"m5": {"structure_dir": number % 3 - 1, "volume_stats": {"total_volume": 325, "delta_close": 53}}}
        record = {
            "id": f"GC 12-24_M5_{stamp}_{number}", "time": stamp, "symbol": "GC 12-24", "tf": "M5", "bar_index": number,
            "session": "Asia", "timestamp": stamp, "open": opened, "high": high, "low": low, "close": close,
            "atr_14": 2.5, "reason": [], "bar": bar, "mtf_context": context,
        }  # fmt: skip
        lines.append(json.dumps(record))
    path.write_text("\n".join(lines) + "\n")
    return path


def _answer(market: Bars) -> list[dict[str, Any]]:
    return [
        {"t": round(when.timestamp() * 1000), "o": opened, "h": high, "l": low, "c": close, "v": volume}
        for when, opened, high, low, close, volume in rows(market)
    ]


def wrapped_json(folder: Path, market: Bars) -> Path:
    """An answer that holds the bars below other fields, as those of brokers do."""
    path = folder / "GC.json"
    bars = [list(bar.values()) for bar in _answer(market)]
    path.write_text(json.dumps({"status": "OK", "result": {"symbol": "GC", "list": bars, "notes": []}}, indent=1))
    return path


def columnar_json(folder: Path, market: Bars) -> Path:
    """An answer with one array per field."""
    path = folder / "GC.json"
    bars = _answer(market)
    path.write_text(json.dumps({"s": "ok", **{name: [bar[name] for bar in bars] for name in bars[0]}}))
    return path


def german_csv(folder: Path, market: Bars) -> Path:
    """German column names, a column for the day and one for the time of day, decimal commas, Windows-1252."""
    path = folder / "GC.csv"
    lines = ["Datum;Uhrzeit;Eröffnung;Hoch;Tief;Schlusskurs;Volumen"]
    for when, *prices, volume in rows(market):
        numbers = (f"{price:,.1f}".translate(str.maketrans(",.", ".,")) for price in prices)
        lines.append(f"{when:%d.%m.%Y};{when:%H:%M};{';'.join(numbers)};{volume}")
    path.write_text("\n".join(lines), encoding="cp1252")
    return path


def spanish_csv(folder: Path, market: Bars) -> Path:
    path = folder / "GC.csv"
    lines = ["Fecha,Último,Apertura,Máximo,Mínimo,Vol."]
    for when, opened, high, low, close, volume in rows(market):
        lines.append(f"{when:%d/%m/%Y %H:%M},{close},{opened},{high},{low},{volume}")
    path.write_text("\n".join(lines), encoding="utf-8")
    return path
