#!/usr/bin/env python3
"""Clients that misbehave, against `upcycle serve`, while another asks for its health and a third for answers.

usage: chaos_serve.py URL [--seconds 5] [--sockets 1000] [--megabytes 100] [--key KEY]

In turn, each for --seconds: connections that say nothing; heads and bodies that come a byte at a time; clients that leave while their answer is
written, whole and streamed; clients that never read; random bytes; requests that are nearly right; a body of --megabytes; --sockets connections at once. All the
while /health must answer 200 within a second, and afterwards a completion must be what it was before, no text may run or wait, and the open files
must be as many as before. Exit code 1 if not. Standard library only.
"""
import argparse, http.client, json, os, random, re, resource, socket, sys, threading, time, urllib.parse

LONG = json.dumps(dict(prompt="Problem:", n=8, max_tokens=400, logit_bias={"0": -100}))


class Server:
    def __init__(self, url, key):
        self.place = urllib.parse.urlsplit(url)
        self.key = {"Authorization": f"Bearer {key}"} if key else {}

    def request(self, method, path, body=None, timeout=120):
        connection = http.client.HTTPConnection(self.place.hostname, self.place.port, timeout=timeout)
        try:
            connection.request(method, path, body, self.key)
            answer = connection.getresponse()
            return answer.status, answer.read()
        finally:
            connection.close()

    def connect(self):
        return socket.create_connection((self.place.hostname, self.place.port), timeout=60)

    def head(self, length, extra=""):
        key = "".join(f"{name}: {value}\r\n" for name, value in self.key.items())
        return f"POST /v1/completions HTTP/1.1\r\nHost: {self.place.netloc}\r\n{key}{extra}Content-Length: {length}\r\n\r\n".encode()

    def metric(self, name):
        page = self.request("GET", "/metrics")[1].decode()
        return sum(float(value) for value in re.findall(rf"^{name}\{{.*\}} (\S+)$", page, re.M))


def silence(server, until):
    sockets = [server.connect() for _ in range(50)]
    time.sleep(max(0, until - time.monotonic()))
    [s.close() for s in sockets]


def drops(server, until):
    parts = [iter(b"GET /health HTTP/1.1\r\nHost: x\r\n" * 50), iter(server.head(1000) + b" " * 900)]
    sockets = [server.connect() for _ in range(40)]
    feeds = [bytes(parts[i % 2]) for i in range(40)]
    at = 0
    while time.monotonic() < until:
        for s, feed in zip(sockets, feeds):
            try:
                s.sendall(feed[at:at + 1])
            except OSError:
                pass
        at += 1
        time.sleep(0.05)
    [s.close() for s in sockets]


def leave(server, until, stream):
    body = json.loads(LONG) | dict(stream=stream)
    while time.monotonic() < until:
        with server.connect() as s:
            s.sendall(server.head(len(json.dumps(body))) + json.dumps(body).encode())
            time.sleep(random.random() / 5)


def never_read(server, until):
    body = json.dumps(json.loads(LONG) | dict(stream=True)).encode()
    sockets = []
    for _ in range(4):
        s = server.connect()
        s.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
        s.sendall(server.head(len(body)) + body)
        sockets.append(s)
    time.sleep(max(0, until - time.monotonic()))
    [s.close() for s in sockets]


def garbage(server, until):
    draw = random.Random(1)
    while time.monotonic() < until:
        with server.connect() as s:
            try:
                s.sendall(draw.randbytes(draw.randrange(1, 5000)))
                s.shutdown(socket.SHUT_WR)
                s.recv(1000)
            except OSError:
                pass


def nearly_right(server, until):
    draw = random.Random(2)
    good = [json.loads(LONG) | dict(n=1, max_tokens=2), dict(messages=[dict(role="user", content="?")], max_tokens=2)]
    wrong = [None, -1, 0, 1e300, "x" * 3000, [], {}, [[[]]], True, "\ud800", {"a": {"b": [1, None]}}]
    while time.monotonic() < until:
        body = dict(draw.choice(good))
        for _ in range(draw.randrange(1, 4)):
            body[draw.choice(list(body) + ["stop", "tools", "seed", "top_p", "response_format", "logit_bias", "model"])] = draw.choice(wrong)
        text = json.dumps(body)
        text = text[:draw.randrange(len(text))] if draw.random() < 0.2 else text
        path = draw.choice(["/v1/completions", "/v1/chat/completions", "/api/chat", "/api/generate", "/models/load"])
        status, answer = server.request("POST", path, text)
        if status >= 500 and status not in (503, 504):
            raise AssertionError(f"{path} {text[:300]}: {status} {answer[:300]}")


def large(server, until, megabytes):
    piece = b" " * (1 << 20)
    with server.connect() as s:
        try:
            s.sendall(server.head(megabytes << 20))
            for _ in range(megabytes):
                s.sendall(piece)
        except OSError:
            pass
        status = s.recv(12)
    if status != b"HTTP/1.1 413":
        raise AssertionError(f"{megabytes} MB were answered with {status}")


def crowd(server, until, sockets):
    opened = []
    for _ in range(sockets):
        opened.append(server.connect())
    for s in opened[::2]:
        s.sendall(b"GET /health HTTP/1.1\r\nHost: " + server.place.netloc.encode() + b"\r\n\r\n")
    answers = [s.recv(12) for s in opened[::2]]
    [s.close() for s in opened]
    if set(answers) != {b"HTTP/1.1 200"}:
        raise AssertionError(f"{sockets} connections were answered with {set(answers)}")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("url")
    parser.add_argument("--pid", type=int, help="the server's, for its open files")
    parser.add_argument("--seconds", type=float, default=5)
    parser.add_argument("--sockets", type=int, default=1000)
    parser.add_argument("--megabytes", type=int, default=100)
    parser.add_argument("--key")
    args = parser.parse_args()
    resource.setrlimit(resource.RLIMIT_NOFILE, (resource.getrlimit(resource.RLIMIT_NOFILE)[1],) * 2)
    server, over, waits, failures = Server(args.url, args.key), threading.Event(), [], []

    def watch():
        while not over.is_set():
            start = time.monotonic()
            try:
                status, _ = server.request("GET", "/health", timeout=10)
            except OSError as error:
                status = error
            waits.append(time.monotonic() - start)
            if status != 200 or waits[-1] > 1:
                failures.append(f"/health: {status} after {waits[-1]:.2f} s")
            time.sleep(0.05)

    probe = json.dumps(dict(prompt="Problem: Compute 12 + 30.\n", max_tokens=8, temperature=0))
    files = lambda: len(os.listdir(f"/proc/{args.pid}/fd")) if args.pid else 0
    told = lambda: json.loads(server.request("POST", "/v1/completions", probe)[1])["choices"]
    before, open_before = told(), files()
    threading.Thread(target=watch, daemon=True).start()
    acts = [
        ("says nothing", silence), ("a byte at a time", drops), ("leaves, whole", lambda s, u: leave(s, u, False)),
        ("leaves, streamed", lambda s, u: leave(s, u, True)), ("never reads", never_read), ("random bytes", garbage), ("nearly right", nearly_right),
        (f"{args.megabytes} MB", lambda s, u: large(s, u, args.megabytes)), (f"{args.sockets} at once", lambda s, u: crowd(s, u, args.sockets)),
    ]
    for name, act in acts:
        seen = len(waits)
        try:
            act(server, time.monotonic() + args.seconds)
        except (AssertionError, OSError) as error:
            failures.append(f"{name}: {error}")
        mine = waits[seen:] or [0]
        print(f"{name:20} /health {len(mine):4} times, {1e3 * max(mine):6.1f} ms at most", flush=True)
    over.set()
    deadline = time.monotonic() + 60
    busy = lambda: server.metric("upcycle_requests_running") + server.metric("upcycle_requests_waiting")
    while busy() and time.monotonic() < deadline:
        time.sleep(0.2)
    if busy():
        failures.append(f"{busy():.0f} texts still run or wait")
    if told() != before:
        failures.append("the answer is not what it was")
    time.sleep(1)
    if files() > open_before + 4:
        failures.append(f"{files()} open files, {open_before} before")
    print(f"open files {open_before} -> {files()}")
    print(*failures[:20] or ["all is well"], sep="\n")
    sys.exit(bool(failures))


if __name__ == "__main__":
    main()
