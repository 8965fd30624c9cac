"""The table of docs/agreement.md: checkpoints converted to GGUF files, which we and llama.cpp then read.

    python agreement.py --work DIR [--paceline BIN] [--types f32,bf16,q8_0,q4_k_m] NAME...        # random weights
    python agreement.py --work DIR ... --text TEXT CHECKPOINT...                                   # trained ones

NAME is one of reference.py's. What each row compares is in the document; `--tokens` says how many rows of logits.
"""
import argparse
import json
import pathlib
import subprocess
import sys

from safetensors import safe_open

REFERENCE = "reference's"
HERE = pathlib.Path(__file__).parent
HEAD = ("| checkpoint | type | paceline: mean abs, mean KL, top-1 | llama.cpp: mean abs, mean KL, top-1 | perplexity: checkpoint, "
        "paceline, llama.cpp | paceline against llama.cpp: max abs, mean KL, perplexity |\n| --- | --- | --- | --- | --- | --- |")


def call(*command, may_fail=False):
    done = subprocess.run([str(c) for c in command], capture_output=True, text=True)
    if done.returncode and may_fail:
        return None
    if done.returncode:
        raise SystemExit(f"{' '.join(map(str, command[:4]))}: {done.stderr.strip()[-400:]}")
    return done.stdout


def summary(peers, file, *args, may_fail=False):
    report = call(peers, "logits", file, "--json", *args, may_fail=may_fail)
    if report is None:
        return None
    lines = json.loads(report)["tables"]["all but the last row"]
    return {line["engine"]: line for line in lines}


def show(line):
    return f"{line['mean abs']:.2g}, {line['mean KL']:.2g}, {100 * line['same top-1']:.1f} %"


def main():
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("checkpoints", nargs="+")
    ap.add_argument("--work", type=pathlib.Path, required=True)
    ap.add_argument("--paceline", default="paceline")
    ap.add_argument("--peers", default=HERE / "target" / "release" / "peers")
    ap.add_argument("--types", default="f32,bf16,q8_0,q4_k_m")
    ap.add_argument("--text", type=pathlib.Path)
    ap.add_argument("--tokens", type=int, default=300)
    a = ap.parse_args()
    a.work.mkdir(parents=True, exist_ok=True)
    print(HEAD, flush=True)
    reference = [sys.executable, HERE / "reference.py"]
    for name in a.checkpoints:
        folder = pathlib.Path(name) if a.text else a.work / name
        if not a.text and not folder.exists():
            call(*reference, "random", name, folder)
        short = folder.parent.name if folder.name == "hf" else folder.name
        recorded = a.work / f"{short}.safetensors"
        if not recorded.exists():
            text = ["--text", a.text] if a.text else []
            call(*reference, "logits", folder, "--out", recorded, "--tokens", a.tokens, *text)
        with safe_open(recorded, "np") as f:
            tokens = ",".join(map(str, f.get_tensor("tokens")))
        for ty in a.types.split(","):
            file = a.work / f"{short}-{ty}.gguf"
            call(a.paceline, "convert", folder, file, "--type", ty)
            both = summary(a.peers, file, "--reference", recorded, "--engines", "paceline,llama.cpp")
            # For some architectures llama.cpp can't take rows back, which this command also tries.
            direct = summary(a.peers, file, "--tokens", tokens, "--engines", "paceline,llama.cpp", may_fail=True)
            ours, theirs = both["paceline"], both["llama.cpp"]
            ratio = 100 * (ours["perplexity"] / theirs["perplexity"] - 1)
            means = f"{ours[REFERENCE]:.5g}, {ours['perplexity']:.5g}, {theirs['perplexity']:.5g}"
            apart = f"{direct['paceline']['max abs']:.2g}, {direct['paceline']['mean KL']:.2g}" if direct else "–"
            apart += f", {ratio:+.2f} %"
            print(f"| {short} | {ty} | {show(ours)} | {show(theirs)} | {means} | {apart} |", flush=True)
            file.unlink()


if __name__ == "__main__":
    main()
