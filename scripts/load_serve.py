#!/usr/bin/env python3
"""Clients that keep `upcycle serve` busy: what each waits for its first token and for the next ones, and whether the process grows.

usage: load_serve.py URL --pid PID [--clients 1,8,64] [--seconds 60] [--tokens 32] [--key KEY] [--model NAME]

Every client asks for streams of --tokens tokens, one after the other, each with another beginning, for --seconds; half of them chat, half complete.
Printed per number of clients: requests, errors, tokens per second, p50 and p99 of the time to the first token and between tokens, and the process'
resident memory and open files before and after. Exit code 1 if any request failed. Standard library only; memory and files from /proc.
"""
import argparse, http.client, json, os, random, statistics, sys, threading, time, urllib.parse


def percentile(values, share):
    return sorted(values)[min(len(values) - 1, int(len(values) * share))] if values else float("nan")


def resources(pid):
    """Resident MiB and open files of a process."""
    with open(f"/proc/{pid}/status") as status:
        resident = next(int(line.split()[1]) for line in status if line.startswith("VmRSS"))
    return resident / 1024, len(os.listdir(f"/proc/{pid}/fd"))


class Client(threading.Thread):
    def __init__(self, args, number, until):
        super().__init__(daemon=True)
        self.args, self.random, self.until = args, random.Random(number), until
        self.first, self.between, self.errors, self.tokens, self.requests = [], [], [], 0, 0

    def run(self):
        url = urllib.parse.urlsplit(self.args.url)
        connection = http.client.HTTPConnection(url.hostname, url.port, timeout=600)
        while time.monotonic() < self.until:
            try:
                self.ask(connection)
            except (OSError, http.client.HTTPException, ValueError) as error:
                self.errors.append(repr(error))
                connection.close()

    def ask(self, connection):
        a, b = self.random.randrange(100), self.random.randrange(100)
        body = dict(stream=True, max_tokens=self.args.tokens, logit_bias={"0": -100}, stream_options={"include_usage": True})
        if self.args.model:
            body["model"] = self.args.model
        if self.random.random() < 0.5:
            path, body["messages"] = "/v1/chat/completions", [dict(role="user", content=f"Compute {a} + {b}.")]
        else:
            path, body["prompt"] = "/v1/completions", f"Problem: Compute {a} + {b}.\n"
        headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {self.args.key}"} if self.args.key else {})
        last, begun = time.perf_counter(), False
        connection.request("POST", path, json.dumps(body), headers)
        answer = connection.getresponse()
        if answer.status != 200:
            raise ValueError(f"{answer.status} {answer.read()[:200]}")
        done = False
        for line in answer:
            if line.strip() == b"data: [DONE]":
                done = True
            elif line.startswith(b"data: "):
                chunk = json.loads(line[6:])
                if "error" in chunk:
                    raise ValueError(chunk["error"]["message"])
                if chunk["usage"]:
                    self.tokens += chunk["usage"]["completion_tokens"]
                if any(choice.get("text") or choice.get("delta", {}).get("content") for choice in chunk["choices"]):
                    now = time.perf_counter()
                    (self.between if begun else self.first).append(now - last)
                    last, begun = now, True
        if not done:
            raise ValueError("a stream ended without [DONE]")
        self.requests += 1


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("url")
    parser.add_argument("--pid", type=int, required=True)
    parser.add_argument("--clients", default="1,8,64")
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--key")
    parser.add_argument("--model")
    args = parser.parse_args()
    print("clients requests errors tokens/s  ttft p50/p99 ms   between p50/p99 ms   RSS MiB before/after   files before/after")
    failed = False
    for number in map(int, args.clients.split(",")):
        before, start = resources(args.pid), time.monotonic()
        clients = [Client(args, i, start + args.seconds) for i in range(number)]
        [client.start() for client in clients]
        [client.join() for client in clients]
        took = time.monotonic() - start
        time.sleep(1)
        after = resources(args.pid)
        first, between = ([1e3 * t for c in clients for t in getattr(c, name)] for name in ("first", "between"))
        errors = [error for client in clients for error in client.errors]
        print(f"{number:7} {sum(c.requests for c in clients):8} {len(errors):6} {sum(c.tokens for c in clients) / took:8.0f}"
              f"  {percentile(first, .5):7.1f} / {percentile(first, .99):7.1f}   {percentile(between, .5):7.2f} / {percentile(between, .99):7.2f}"
              f"   {before[0]:10.1f} / {after[0]:.1f}   {before[1]:10} / {after[1]}", flush=True)
        for error in sorted(set(errors))[:5]:
            print(f"  {error}", file=sys.stderr)
        failed |= bool(errors)
    sys.exit(failed)


if __name__ == "__main__":
    main()
