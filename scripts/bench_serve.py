#!/usr/bin/env python3
"""`upcycle serve` against llama-server on one machine: clients that arrive together, with the same prompts.

usage: bench_serve.py --upcycle BIN --model DIR --llama-server BIN --gguf FILE [--rounds 5] [--threads 2] [--clients 8] [--prompt 128] [--tokens 64]
                      [--ours="--kv-type f16"] [--theirs="--no-repack"] [--json]

Prompts are random token ids, different for every client and round, so that no cache helps. In each round each server is started, answers one short
request (start to first token), then all clients at once, and is stopped. Printed are medians of the rounds and of their ratios, ours / theirs:
tokens per second of all clients together while all of them write; time to first token, of the clients' middle one; start to first token; peak of
resident memory. Neither guesses ahead: random weights repeat themselves. DIR and FILE are the same model, with a vocabulary (`bench_llama.py` makes such). Standard library only.
"""
import argparse, http.client, json, random, shlex, signal, socket, statistics, subprocess, sys, threading, time


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def times(port, prompt, tokens):
    """When the request was sent and each piece of its text came, in seconds; None if the server does not answer yet."""
    body = json.dumps(dict(prompt=prompt, max_tokens=tokens, stream=True, temperature=0, ignore_eos=True, cache_prompt=False))
    sent, came = time.perf_counter(), []
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=600)
    try:
        connection.request("POST", "/v1/completions", body, {"Content-Type": "application/json"})
        answer = connection.getresponse()
    except ConnectionError:
        return None
    if answer.status == 503: return None
    if answer.status != 200: sys.exit(f"{answer.status}: {answer.read().decode()}")
    for line in answer:
        if not line.startswith(b"data: {"): continue
        event = json.loads(line[6:])
        if "error" in event: sys.exit(f"a request failed: {event}")
        if any(choice.get("text") for choice in event.get("choices", ())): came.append(time.perf_counter())
    return sent, came


def round_of(command, port, prompts, tokens):
    started = time.perf_counter()
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        while (first := times(port, prompts[0][:8][::-1], 1)) is None:
            if server.poll() is not None: sys.exit(f"{shlex.join(command)} ended with {server.returncode}")
            time.sleep(0.005)
        answers = [None] * len(prompts)
        barrier = threading.Barrier(len(prompts))

        def client(i):
            barrier.wait()
            answers[i] = times(port, prompts[i], tokens)

        clients = [threading.Thread(target=client, args=(i,)) for i in range(len(prompts))]
        for c in clients: c.start()
        for c in clients: c.join()
        with open(f"/proc/{server.pid}/status") as f: peak = next(int(line.split()[1]) for line in f if line.startswith("VmHWM"))
    finally:
        server.send_signal(signal.SIGTERM)
        server.wait()
    # A piece of text is a token, but for the one that ends a text.
    begin, end = max(came[0] for _, came in answers), min(came[-1] for _, came in answers)
    written = sum(begin < t <= end for _, came in answers for t in came)
    gaps = [b - a for _, came in answers for a, b in zip(came, came[1:])]
    return {
        "decode, tokens/s": written / (end - begin) if end > begin else float("nan"),
        "output, tokens/s": sum(len(came) for _, came in answers) / (max(came[-1] for _, came in answers) - min(sent for sent, _ in answers)),
        "first token, s": statistics.median(came[0] - sent for sent, came in answers),
        "longest wait between tokens, s": max(gaps, default=0.0),
        "start to first token, s": first[1][0] - started,
        "peak RSS, MB": peak / 1000 * 1.024,
    }


def main():
    a = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    a.add_argument("--upcycle"); a.add_argument("--model"); a.add_argument("--llama-server"); a.add_argument("--gguf")
    a.add_argument("--rounds", type=int, default=5); a.add_argument("--threads", type=int, default=2); a.add_argument("--clients", type=int, default=8)
    a.add_argument("--prompt", type=int, default=128); a.add_argument("--tokens", type=int, default=64); a.add_argument("--vocab", type=int, default=32000)
    a.add_argument("--ours", default=""); a.add_argument("--theirs", default=""); a.add_argument("--json", action="store_true")
    a = a.parse_args()
    context = a.prompt + a.tokens + 64
    servers = {}
    if a.upcycle:
        servers["ours"] = lambda port: [a.upcycle, "serve", a.model, "--port", port, "-j", a.threads, "--parallel", a.clients, "--lookup", 0,
                                        *shlex.split(a.ours)]
    if a.llama_server:
        servers["theirs"] = lambda port: [a.llama_server, "-m", a.gguf, "--port", port, "-t", a.threads, "-np", a.clients, "-c", context * a.clients,
                                          *shlex.split(a.theirs)]
    if not servers: sys.exit("give --upcycle and --model, --llama-server and --gguf, or all four")
    found = {name: [] for name in servers}
    for number in range(a.rounds + 1):
        draw = random.Random(number)
        prompts = [[draw.randrange(3, a.vocab) for _ in range(a.prompt)] for _ in range(a.clients)]
        for name, command in servers.items():
            port = free_port()
            result = round_of([str(part) for part in command(port)], port, prompts, a.tokens)
            # The first round fills the page cache.
            if number: found[name].append(result)
            if not a.json: print(f"round {number}, {name}: " + ", ".join(f"{k} {v:.2f}" for k, v in result.items()), file=sys.stderr, flush=True)
    table = {}
    for key in next(iter(found.values()))[0]:
        table[key] = {name: statistics.median(r[key] for r in rounds) for name, rounds in found.items()}
        if len(found) == 2: table[key]["ratio"] = statistics.median(o[key] / t[key] for o, t in zip(*found.values()))
    if a.json: return print(json.dumps(table))
    print(f"{a.clients} clients at once, prompts of {a.prompt}, {a.tokens} tokens each; medians of {a.rounds} rounds")
    for key, row in table.items(): print(f"{key:32}" + "".join(f"  {name} {value:9.2f}" for name, value in row.items()))


if __name__ == "__main__":
    main()
