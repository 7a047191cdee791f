"""Score SmolLM2-135M, which has learned nothing new, where each token sees a window, with and without the first token.

    python benchmarks/converting_windows.py source=FILE.gguf [windows=2]

Held-out text in windows of 512 and of 2,048 tokens; writes results/converting.json.
"""

from typing import Any

from teacher import TEACHER, load, make_teacher, open_student, open_text, read_options, save

CONTEXTS, WINDOWS = (512, 2048), (64, 128, 256, 512)


def measure_windows(texts: int) -> list[dict[str, Any]]:
    """Return bits per byte by length of the text, window and number of first tokens in sight."""
    rows = []
    for context in CONTEXTS:
        text = open_text(texts * CONTEXTS[-1] // context, context=context)
        whole = text.measure(text.teacher).bits_per_byte
        for window in (window for window in WINDOWS if window < context):
            for sinks in (0, 1, 4):
                student = open_student(TEACHER, f"attn=local attn.window={window} attn.sinks={sinks}")
                bpb = text.measure(student).bits_per_byte
                rows.append({"context": context, "window": window, "sinks": sinks, "bpb": bpb, "teacher": whole})
                print(rows[-1], flush=True)
    return rows


def tabulate(rows: list[dict[str, Any]]) -> str:
    """Return bits per byte by context and window; a column for each number of first tokens."""
    sinks = sorted({row["sinks"] for row in rows})
    titles = [f"{count} first" for count in sinks]
    lines = [f"| text | window | {' | '.join(titles)} | all in sight |", "|---" * (3 + len(sinks)) + "|"]
    for context, window, whole in dict.fromkeys((row["context"], row["window"], row["teacher"]) for row in rows):
        own = {row["sinks"]: row["bpb"] for row in rows if (row["context"], row["window"]) == (context, window)}
        lines.append(f"| {context:,} | {window} | {' | '.join(f'{own[n]:.3f}' for n in sinks)} | {whole:.3f} |")
    return "\n".join(lines)


def main() -> None:
    """Measure, and print the table."""
    options = read_options()
    make_teacher(options)
    save(windows=measure_windows(int(options.get("windows", 2))))
    print(tabulate(load()["windows"]))


if __name__ == "__main__":
    main()
