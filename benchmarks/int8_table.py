"""What ``int8_peers.py`` prints: a table a model, and whether MiniLM keeps its limits."""

from __future__ import annotations

from typing import Any

from int8_rows import ROWS
from int8_tools import TOOLS

MAIN = {"minilm": "sentence_embedding", "vit-s": "output_importance", "gemma3-270m": "logits"}
LIMITS = [("ours-ffn", "cosine_mean", 0.9990), ("ours-ffn", "speedup", 1.35),
          ("ours-all", "cosine_mean", 0.9970), ("ours-all", "of_per_channel", 0.90)]


def show(result: dict[str, Any], name: str, size: int) -> None:
    """The table of one model of ``size`` bytes."""
    races, drift = result["races"][name], result["drift"][name]
    heads = [f"{name} (model.onnx {size / 1e6:.0f} MB)", "MB", f"cosine of {MAIN[name]}", "rel_l2",
             *(f"{title} (95 % interval)" for title in races), "of per channel"]
    print("\n| " + " | ".join(heads) + " |\n|" + " --- |" * len(heads))
    for key, metrics in drift.items():
        found = [races[title].get(key) for title in races]
        speeds = [f"{each['speedup']:.2f} ({each['low']:.2f} to {each['high']:.2f})" if each else "–" for each in found]
        beside = [f"{each['of_per_channel']:.2f}" if each and "of_per_channel" in each else "–" for each in found]
        cells = [ROWS.get(key) or TOOLS[key], f"{metrics['bytes'] / 1e6:.0f}", f"{metrics['cosine_mean']:.5f}",
                 f"{metrics['rel_l2']:.4f}", *speeds, " ".join(beside)]
        print("| " + " | ".join(cells) + " |")
    for key, reason in result["left_out"][name].items():
        print(f"left out: {ROWS.get(key) or TOOLS[key]}: {reason}")
    for title, each in result["auto"].get(name, {}).items():
        chosen = "quantized" if each["fired"] else "left alone"
        print(f"target=auto on {title}: {chosen}, {each['speedup']:.2f} ({each['low']:.2f} to {each['high']:.2f}); "
              f"{'; '.join(each['notes'])}")


def check(result: dict[str, Any]) -> int:
    """Print the limits for MiniLM, at 8×128 where it is speed; 1 if one is missed."""
    drift, races = result["drift"].get("minilm", {}), result["races"].get("minilm", {})
    missed = 0
    for key, what, limit in LIMITS:
        rows = {"real text": drift} if what == "cosine_mean" else {
            title: each for title, each in races.items() if title.startswith("8x128")}
        for title, each in rows.items():
            if what in each.get(key, {}):
                number = each[key][what]
                print(f"MiniLM {key}, {title}: {what} {number:.4f}, limit {limit}: {'met' if number >= limit else 'MISSED'}")
                missed += number < limit
    return int(missed > 0)
