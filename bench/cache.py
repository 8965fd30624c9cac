#!/usr/bin/env python3
"""What the prompt cache of a real server is good for, and whether it holds.

    bench/cache.py chat   [--turns 20] [--tokens 32768]   a chat that grows, against the same without a cache
    bench/cache.py hit    [--prefix 16384]                first token behind a cached prefix, against the new tokens alone
    bench/cache.py files  [--prefix 16384]                bytes per second to files of slots and back
    bench/cache.py stress [--minutes 10] [--slots 8]      mixed lengths, cancels, a cache that is far too small

Common: --bin target/release/paceline, --json FILE for a record, and flags of `paceline serve` behind `--`, which choose the
model; the bundled one without. Only Python's own library is needed. Texts are made up of common words from a seed: what they
say does not matter here, how many tokens they are does.

Ends with 1 if an answer differs from what it is alone, if a request fails, or if memory grows (`stress`).
"""

import argparse
import http.client
import json
import os
import platform
import random
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time

WORDS = """time year people way day man thing woman life child world school state family student group country problem hand
part place case week company system program question work number night point home water room mother area money story fact
month lot right study book eye job word business issue side kind head house service friend father power hour game line end
member law car city name team minute idea body back parent face level office door health person art war history party result
change morning reason research girl guy moment air teacher force education""".split()


def words(n, seed):
    rng = random.Random(seed)
    return " ".join(rng.choice(WORDS) for _ in range(n))


class Server:
    """A `paceline serve` of one's own."""

    def __init__(self, args, flags):
        command = [args.bin, "serve", "--host", "127.0.0.1", "--port", "0", *args.serve, *flags]
        self.flags = " ".join([*args.serve, *flags])
        self.process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        self.log = []
        for line in self.process.stderr:
            self.log.append(line)
            if "listening on http://" in line:
                self.port = int(line.rsplit(":", 1)[1])
                break
        else:
            sys.exit("the server did not start:\n" + "".join(self.log))
        threading.Thread(target=lambda: self.log.extend(self.process.stderr), daemon=True).start()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.stop()

    def stop(self):
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            self.process.wait(60)

    def open(self, method, path, body=None):
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=600)
        connection.request(method, path, None if body is None else json.dumps(body))
        return connection, connection.getresponse()

    def ask(self, path, body):
        connection, reply = self.open("POST", path, body)
        value = json.loads(reply.read())
        connection.close()
        if reply.status != 200:
            raise RuntimeError(f"{path}: {reply.status} {value}")
        return value

    def stream(self, path, body):
        """Seconds to the first text, the text, the last object with timings."""
        begin = time.perf_counter()
        connection, reply = self.open("POST", path, {**body, "stream": True})
        if reply.status != 200:
            raise RuntimeError(f"{path}: {reply.status} {reply.read()}")
        first, text, last = None, "", {}
        for line in reply:
            if not line.startswith(b"data: {"):
                continue
            value = json.loads(line[6:])
            choices = value.get("choices")
            piece = choices[0]["delta"].get("content") if choices else value.get("content")
            if piece:
                first = first or time.perf_counter() - begin
                text += piece
            if "timings" in value:
                last = value
        connection.close()
        return first or time.perf_counter() - begin, text, last

    def tokens(self, text):
        return self.ask("/tokenize", {"content": text})["tokens"]

    def metrics(self):
        connection, reply = self.open("GET", "/metrics")
        lines = reply.read().decode().splitlines()
        connection.close()
        pairs = (line.rsplit(" ", 1) for line in lines if not line.startswith("#"))
        return {name: float(value) for name, value in pairs}

    def build(self):
        connection, reply = self.open("GET", "/props")
        value = json.loads(reply.read())
        connection.close()
        return value["build_info"]

    def rss(self):
        with open(f"/proc/{self.process.pid}/status") as status:
            return int(next(line for line in status if line.startswith("VmRSS:")).split()[1]) * 1024


def table(head, rows):
    rows = [[str(cell) for cell in row] for row in rows]
    print("| " + " | ".join(head) + " |")
    print("|" + "---|" * len(head))
    for row in rows:
        print("| " + " | ".join(row) + " |")


def prompt_of(server, n, seed):
    """So many tokens."""
    tokens, more = [], 0
    while len(tokens) < n:
        tokens += server.tokens(words(4096, f"{seed}.{more}"))
        more += 1
    return tokens[:n]


def chat(args):
    context = ["-c", str(args.tokens + 2048), "-np", "1"]
    greedy = {"temperature": 0, "max_tokens": args.answer, "seed": 1}

    def ask(server, messages, turn):
        seconds, text, last = server.stream("/v1/chat/completions", {**greedy, "messages": messages})
        timings = last["timings"]
        return {"turn": turn, "reused": timings["cache_n"], "computed": timings["prompt_n"],
                "ttft_ms": seconds * 1e3, "text": text}

    on, off, history = [], [], []
    with Server(args, context) as server:
        build = server.build()
        per_word = len(server.tokens(words(2000, "rate"))) / 2000
        n_word = int((args.tokens / args.turns - args.answer - 16) / per_word)
        messages = []
        for turn in range(1, args.turns + 1):
            messages.append({"role": "user", "content": words(n_word, f"turn {turn}")})
            history.append(list(messages))
            on.append(ask(server, messages, turn))
            messages.append({"role": "assistant", "content": on[-1]["text"]})
    with Server(args, [*context, "--no-cache-prompt", "--cache-ram", "0"]) as server:
        turns = [turn for turn in range(1, args.turns + 1) if turn % args.every == 0]
        off = [ask(server, history[turn - 1], turn) for turn in turns]
    same = [one["text"] == on[one["turn"] - 1]["text"] for one in off]
    beside = {one["turn"]: one for one in off}
    rows = []
    for one in on:
        other = beside.get(one["turn"])
        rows.append([one["turn"], one["reused"] + one["computed"], one["reused"], one["computed"],
                     f"{one['ttft_ms']:.0f}", f"{one['ttft_ms'] / one['computed']:.3f}",
                     other["computed"] if other else "", f"{other['ttft_ms']:.0f}" if other else ""])
    table(["turn", "prompt", "reused", "computed", "first token ms", "ms per computed token",
           "computed, no cache", "first token ms, no cache"], rows)
    print(f"\nanswers equal with and without cache: {sum(same)} of {len(same)}")
    for one in on + off:
        del one["text"]
    return {"build": build, "on": on, "off": off, "equal": sum(same)}, all(same)


def hit(args):
    """The new tokens alone: what the forwards over them cost behind that prefix, as the server's own clock says."""
    rows, record = [], []
    with Server(args, ["-c", str(args.prefix + 4096), "-np", "1"]) as server:
        build = server.build()
        prefix = words(2 * args.prefix, "prefix")
        tokens = server.tokens(prefix)
        text = prefix
        while len(tokens) > args.prefix:
            text = text[: int(len(text) * args.prefix / len(tokens)) - 1]
            tokens = server.tokens(text)
        first = {"role": "user", "content": text}
        body = {"temperature": 0, "max_tokens": 1, "seed": 1}
        cold, answer, last = server.stream("/v1/chat/completions", {**body, "messages": [first]})
        n_prefix = last["timings"]["prompt_n"]
        for n_new in args.new:
            runs = []
            for run in range(args.runs):
                talk = [first, {"role": "assistant", "content": answer},
                        {"role": "user", "content": words(n_new, f"question {n_new} {run}")}]
                before = server.metrics()
                seconds, _, last = server.stream("/v1/chat/completions", {**body, "messages": talk})
                after = server.metrics()
                stages = ["verify", "commit", "draft"]
                forwards = sum(after[f"paceline:spec_{s}_seconds_total"] - before[f"paceline:spec_{s}_seconds_total"]
                               for s in stages)
                runs.append({
                    "ttft_ms": seconds * 1e3,
                    "forwards_ms": forwards * 1e3,
                    "n_forward": after["llamacpp:n_decode_total"] - before["llamacpp:n_decode_total"],
                    "server_ms": last["timings"]["prompt_ms"],
                    "computed": last["timings"]["prompt_n"],
                    "reused": last["timings"]["cache_n"],
                })
            runs.sort(key=lambda run: run["ttft_ms"] / run["forwards_ms"])
            middle = runs[len(runs) // 2]
            over = middle["ttft_ms"] / middle["forwards_ms"] - 1
            record.append({"new": n_new, "median": middle, "over": over, "runs": runs})
            rows.append([middle["reused"], middle["computed"], f"{middle['ttft_ms']:.1f}", f"{middle['server_ms']:.1f}",
                         f"{middle['forwards_ms']:.1f}", f"{middle['n_forward']:.0f}", f"{100 * over:.1f} %"])
    print(f"cold: {n_prefix} tokens, first token after {cold * 1e3:.0f} ms\n")
    table(["reused", "computed", "first token ms", "of it in the engine", "the new tokens alone ms", "forwards", "more"], rows)
    return {"build": build, "cold_ms": cold * 1e3, "n_prefix": n_prefix, "hits": record}, True


def files(args):
    rows, record = [], {}
    folder = tempfile.mkdtemp(dir=args.dir)
    try:
        with Server(args, ["-c", str(args.prefix + 4096), "-np", "1", "--slot-save-path", folder]) as server:
            record["build"] = server.build()
            server.ask("/completion", {"prompt": prompt_of(server, args.prefix, 1), "n_predict": 1, "temperature": 0})
            for action, key in [("save", "n_written"), ("restore", "n_read")]:
                runs = []
                for _ in range(args.runs):
                    if action == "restore":
                        server.ask("/slots/0?action=erase", {})
                    done = server.ask(f"/slots/0?action={action}", {"filename": "x"})
                    runs.append(done[key] / done["timings"][f"{action}_ms"] / 1e6)
                record[action] = {"bytes": done[key], "gb_s": runs}
                rows.append([action, f"{done[key] / 1e6:.1f}", f"{statistics.median(runs):.2f}", f"{max(runs):.2f}"])
    finally:
        shutil.rmtree(folder)
    table(["", "MB", "GB/s, median", "GB/s, best"], rows)
    return record, True


def stress(args):
    rng = random.Random(args.seed)
    lengths = [16, 60, 200, 700, 1500, 3000, 6000, 12000]
    lengths = [n for n in lengths if n < args.tokens - 200] + [args.tokens - 200]
    shapes = []
    # Chats, edits and continuations: prompts that share beginnings of any length.
    with Server(args, ["-c", str(args.tokens), "-np", "1", "--cache-ram", "0", "--draft-fixed"]) as server:
        build = server.build()
        bases = [prompt_of(server, max(lengths), f"base {i}") for i in range(3)]
        for i, n in enumerate(lengths):
            for variant in range(3 if n < 10000 else 1):
                base = bases[variant % 2]
                own = prompt_of(server, 24, f"end {i} {variant}")
                prompt = (base[: n - 24] + own)[-n:] if n > 24 else own[:n]
                temperature = rng.choice([0, 0.8])
                shapes.append({"prompt": prompt, "n_predict": rng.choice([1, 8, 24]), "temperature": temperature,
                               "seed": 7, "n_probs": 2, "return_tokens": True, "ignore_eos": True})
        print(f"{len(shapes)} requests alone, in turn …", file=sys.stderr)
        essence = lambda reply: (reply["tokens"], reply["completion_probabilities"], reply["stop_type"])
        begin = time.time()
        alone = [essence(server.ask("/completion", shape)) for shape in shapes]
        print(f"… in {time.time() - begin:.0f} s", file=sys.stderr)
    weights = [1 / (1 + len(shape["prompt"]) / 1500) for shape in shapes]
    folder = tempfile.mkdtemp(dir=args.dir)
    counts = {"answers": 0, "cancels": 0, "different": 0, "errors": 0}
    faults, lock, samples = [], threading.Lock(), []
    flags = ["-c", str(args.tokens * args.slots), "-np", str(args.slots), "--cache-ram", str(args.cache_ram), "--draft-fixed",
             "--cache-disk", folder, "--cache-disk-size", str(args.cache_disk)]
    try:
        with Server(args, flags) as server:
            end = time.time() + 60 * args.minutes

            def client(number):
                rng = random.Random(f"{args.seed} {number}")
                while time.time() < end:
                    at = rng.choices(range(len(shapes)), weights)[0]
                    try:
                        if rng.random() < 0.15:
                            connection, reply = server.open("POST", "/completion", {**shapes[at], "stream": True})
                            time.sleep(rng.random() * 2)
                            reply.read1(64) if rng.random() < 0.5 else None
                            connection.sock and connection.sock.close()
                            connection.close()
                            with lock:
                                counts["cancels"] += 1
                            continue
                        got = essence(server.ask("/completion", shapes[at]))
                        with lock:
                            counts["answers"] += 1
                            if got != alone[at]:
                                counts["different"] += 1
                                faults.append(f"request {at} ({len(shapes[at]['prompt'])} tokens) differs")
                    except Exception as error:
                        with lock:
                            counts["errors"] += 1
                            faults.append(repr(error))

            clients = [threading.Thread(target=client, args=(n,)) for n in range(args.slots + 2)]
            [thread.start() for thread in clients]
            while time.time() < end:
                time.sleep(5)
                samples.append(server.rss())
            [thread.join() for thread in clients]
            time.sleep(2)
            metrics = server.metrics()
            log = [line for line in server.log if "ERROR" in line or "panicked" in line]
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    half = len(samples) // 2
    early, late = max(samples[half // 2 : half]), max(samples[half:])
    kept = {name: metrics[f"paceline:{name}"] for name in
            ["cache_hits_total", "cache_misses_total", "cache_tokens_total", "cache_evictions_total", "cache_bytes",
             "cache_bytes_max", "cache_disk_writes_total", "cache_disk_reads_total", "cache_disk_not_written_total",
             "cache_disk_not_read_total", "cache_disk_evictions_total", "requests_parked_total", "requests_failed_total",
             "requests_cancelled_total", "engine_restarts_total", "kv_pages"]}
    table(["", ""], [*counts.items(), ["RSS, second quarter, MB", f"{early / 1e6:.0f}"],
                     ["RSS, second half, MB", f"{late / 1e6:.0f}"], *kept.items()])
    for fault in faults[:10] + log[:10]:
        print(fault)
    grows = late > early * 1.05 + (32 << 20)
    sound = not (counts["different"] or counts["errors"] or log or grows or kept["kv_pages"]
                 or kept["requests_failed_total"] or kept["engine_restarts_total"])
    return {"build": build, "flags": " ".join(flags[:-4]), "minutes": args.minutes, **counts, "metrics": kept,
            "rss_mb": [round(sample / 1e6, 1) for sample in samples]}, sound


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = {"chat": chat, "hit": hit, "files": files, "stress": stress}
    parser.add_argument("what", choices=what)
    parser.add_argument("--bin", default="target/release/paceline")
    parser.add_argument("--json", help="file for a record")
    parser.add_argument("--turns", type=int, default=20)
    parser.add_argument("--tokens", type=int, default=32768, help="of the chat, or of the longest prompt")
    parser.add_argument("--every", type=int, default=1, help="asks only every Nth turn without a cache too")
    parser.add_argument("--answer", type=int, default=24, help="tokens of an answer")
    parser.add_argument("--prefix", type=int, default=16384)
    parser.add_argument("--new", type=int, nargs="*", default=[16, 64, 256, 1024], help="words behind the prefix")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--slots", type=int, default=8)
    parser.add_argument("--cache-ram", type=int, default=64, help="MiB, of the stress run")
    parser.add_argument("--cache-disk", type=int, default=512, help="MiB, of the stress run")
    parser.add_argument("--dir", help="where temporary folders are made")
    parser.add_argument("--seed", type=int, default=1)
    own, serve = sys.argv[1:], []
    if "--" in own:
        at = own.index("--")
        own, serve = own[:at], own[at + 1 :]
    args = parser.parse_args(own)
    args.serve = serve
    record, sound = what[args.what](args)
    if args.json:
        machine = f"{platform.machine()}, {os.cpu_count()} cores, {platform.system().lower()}"
        # Where files lie says nothing to others.
        where = {args.bin, args.json, args.dir, "--bin", "--json", "--dir"}
        command = ["bench/cache.py", *(word for word in sys.argv[1:] if word not in where)]
        record = {"what": args.what, "machine": machine, "command": " ".join(command), **record}
        with open(args.json, "w") as file:
            json.dump(record, file, indent=1)
            file.write("\n")
    sys.exit(0 if sound else 1)


main()
