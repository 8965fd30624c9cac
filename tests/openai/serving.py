"""A `paceline serve` on a free port, for as long as a `with` block lasts."""

import os
import re
import subprocess
import threading
import time
import urllib.request


class Serving:
    def __init__(self, binary, *flags):
        self.command = [binary, "serve", "--host", "127.0.0.1", "--port", "0", *flags]
        self.log = []

    def __enter__(self):
        ours = ("LLAMA_", "PACELINE_", "HF_")
        env = {name: value for name, value in os.environ.items() if not name.startswith(ours)}
        self.process = subprocess.Popen(
            self.command, env=env, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        self.url = None
        threading.Thread(target=self._follow, daemon=True).start()
        deadline = time.monotonic() + 60
        while not self._is_well():
            if self.process.poll() is not None or time.monotonic() > deadline:
                self.__exit__()
                raise RuntimeError("the server did not start:\n" + "".join(self.log))
            time.sleep(0.02)
        return self

    def __exit__(self, *_):
        self.process.kill()
        self.process.wait()

    def _follow(self):
        for line in self.process.stdout:
            self.log.append(line)
            found = re.search(r"http://[\d.]+:[1-9]\d*", line)
            if found and self.url is None:
                self.url = found.group()

    def _is_well(self):
        if self.url is None:
            return False
        try:
            return urllib.request.urlopen(self.url + "/health", timeout=5).status == 200
        except OSError:
            return False
