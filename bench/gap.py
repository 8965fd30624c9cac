"""How long a stream pauses while another slot computes a long prompt.

    paceline serve -np 2 -c 65536 --port 8081 &
    python3 bench/gap.py http://127.0.0.1:8081 16384

One request streams; when it has said some words a second one comes with a prompt of that many tokens, and the pauses
between the first one's events are taken until the second one has its first token. Prints them in milliseconds: before,
and meanwhile with what the prompt took.
"""

import json
import random
import sys
import threading
import time
import urllib.request


def events(url, body):
    """Times and tokens of a stream's events."""
    request = urllib.request.Request(url + "/completion", json.dumps(body | {"stream": True}).encode(),
                                     {"Content-Type": "application/json"})
    with urllib.request.urlopen(request) as reply:
        for line in reply:
            if line.startswith(b"data: {"):
                yield time.monotonic(), json.loads(line[6:])


def main(url, n_prompt):
    common = {"cache_prompt": False, "ignore_eos": True, "temperature": 0}
    stamps = []
    ready, done = threading.Event(), threading.Event()

    def stream():
        for now, _ in events(url, common | {"prompt": "Once there was a cat, and", "n_predict": 100_000}):
            stamps.append(now)
            if len(stamps) == 200:
                ready.set()
            if done.is_set():
                return

    thread = threading.Thread(target=stream, daemon=True)
    thread.start()
    ready.wait()
    prompt = [random.Random(1).randrange(300, 4000) for _ in range(n_prompt)]
    start = time.monotonic()
    first = next(now for now, event in events(url, common | {"prompt": prompt, "n_predict": 1})
                 if event.get("tokens") or event.get("content"))
    done.set()
    thread.join(10)
    gaps = lambda a, b: sorted(1e3 * (y - x) for x, y in zip(stamps, stamps[1:]) if a <= x and y <= b)
    show = lambda gaps: f"{len(gaps)} pauses, median {gaps[len(gaps) // 2]:.1f} ms, longest {gaps[-1]:.1f} ms"
    print(f"alone: {show(gaps(0, start))}")
    print(f"beside a prompt of {n_prompt} tokens, computed in {1e3 * (first - start):.0f} ms: {show(gaps(start, first))}")


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
