#!/usr/bin/env python3
"""upcycle against llama.cpp on one machine, by type of weights: prefill and decoding of one sequence, and both servers with clients at once.

usage: bench_llama.py WORK --upcycle BIN [--llama-bin DIR] [--models moe-1b,qwen3moe-1b] [--types bf16,q8_0,q4_k_m] [--rounds 5] [--threads 2]
                      [--clients 8] [--no-servers]

Makes the random-weight models in WORK (once): bf16 as a directory for us and as GGUF for llama.cpp, from the same bytes; blocks by llama-quantize, of
which both read the same file. Builds llama.cpp there from the source package of llama-cpp-python unless a folder of its programs is given. Then
runs both in turn and prints medians and the median of the rounds' ratios; llama.cpp with blocks of four bits in both of its settings of
`--repack`, of which each row takes the better. Needs numpy; for the build pip, cmake, ninja and a C++ compiler.
"""
import argparse, glob, json, os, statistics, subprocess, sys
import numpy as np
import bench_serve

PACKAGE = "llama-cpp-python==0.3.36"
OPTIONS = ["CMAKE_BUILD_TYPE=Release", "GGML_NATIVE=ON", "LLAMA_CURL=OFF", "LLAMA_OPENSSL=OFF", "LLAMA_BUILD_UI=OFF", "LLAMA_USE_PREBUILT_UI=OFF",
           "LLAMA_BUILD_TESTS=OFF", "LLAMA_BUILD_EXAMPLES=OFF", "BUILD_SHARED_LIBS=OFF"]
# layers, hidden, ffn of an expert, experts, chosen, heads, key/value heads, head size, vocabulary
MODELS = {"moe-1b": ("mixtral", 24, 1024, 3584, 4, 2, 16, 8, 64, 32000), "qwen3moe-1b": ("qwen3_moe", 20, 1024, 768, 16, 4, 16, 4, 64, 151936)}


def run(*command, **more):
    return subprocess.run([str(part) for part in command], check=True, **more)


def source(work):
    """llama.cpp's source folder."""
    found = lambda: glob.glob(f"{work}/llama_cpp_python-*/vendor/llama.cpp")
    if not found():
        # Building the package's metadata needs its build system; pip would build cmake from source.
        run(sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--no-build-isolation", "--no-binary", "llama-cpp-python", PACKAGE, "-d", work)
        run("tar", "xzf", glob.glob(f"{work}/llama_cpp_python-*.tar.gz")[0], "-C", work)
    return found()[0]


def build(llama, threads):
    programs = [f"llama-{name}" for name in ("bench", "quantize", "server")]
    if not all(os.path.exists(f"{llama}/build/bin/{program}") for program in programs):
        # A .git of the package's own repository misleads its cmake files.
        run("rm", "-rf", f"{llama}/.git")
        run("cmake", "-G", "Ninja", "-S", llama, "-B", f"{llama}/build", *[f"-D{option}" for option in OPTIONS])
        run("cmake", "--build", f"{llama}/build", "-j", threads, "--target", *programs)
    return f"{llama}/build/bin"


def write_safetensors(path, tensors):
    """bf16 tensors, given as their bits."""
    header, end = {}, 0
    for name, bits in tensors.items():
        header[name] = dict(dtype="BF16", shape=bits.shape, data_offsets=[end, end := end + bits.nbytes])
    header = json.dumps(header).encode()
    with open(path, "wb") as f:
        f.write(len(header).to_bytes(8, "little") + header)
        for bits in tensors.values(): f.write(bits.tobytes())


def make(name, work, llama):
    """(directory, GGUF) of the same random bf16 weights"""
    directory, file = f"{work}/{name}", f"{work}/{name}-bf16.gguf"
    if os.path.exists(f"{directory}/config.json"): return directory, file
    sys.path.insert(0, f"{llama}/gguf-py")
    import gguf
    model_type, L, D, F, E, K, H, KV, hd, V = MODELS[name]
    qwen = model_type == "qwen3_moe"
    rng, tensors = np.random.default_rng(7), {}
    w = gguf.GGUFWriter(file, "qwen3moe" if qwen else "llama")
    w.add_block_count(L); w.add_context_length(4096); w.add_embedding_length(D); w.add_feed_forward_length(F)
    w.add_head_count(H); w.add_head_count_kv(KV); w.add_key_length(hd); w.add_value_length(hd); w.add_rope_dimension_count(hd)
    w.add_rope_freq_base(1e6); w.add_layer_norm_rms_eps(1e-5); w.add_expert_count(E); w.add_expert_used_count(K); w.add_vocab_size(V)
    w.add_file_type(gguf.LlamaFileType.MOSTLY_BF16)
    # Servers want to name what they write.
    words = [f"t{i}" for i in range(V)]
    w.add_tokenizer_model("llama"); w.add_token_list(words); w.add_token_scores([0.0] * V); w.add_token_types([gguf.TokenType.NORMAL] * V)
    if qwen: w.add_expert_feed_forward_length(F)

    def rounded(x):
        """The bits of bf16, to the nearest, ties to even."""
        bits = x.view(np.uint32)
        return ((bits + 0x7fff + ((bits >> 16) & 1)) >> 16).astype(np.uint16)

    def normal(*shape):
        return rounded(rng.standard_normal(shape, dtype=np.float32) * np.float32(0.02))

    def add(ours, theirs, bits, wide=False):
        if ours: tensors[ours] = bits
        if wide: w.add_tensor(theirs, (bits.astype(np.uint32) << 16).view(np.float32))
        else: w.add_tensor(theirs, bits.view(np.uint8), raw_dtype=gguf.GGMLQuantizationType.BF16)

    ones = rounded(np.ones(D, np.float32))
    add("model.embed_tokens.weight", "token_embd.weight", normal(V, D))
    add("lm_head.weight", "output.weight", normal(V, D))
    add("model.norm.weight", "output_norm.weight", ones, True)
    for i in range(L):
        p, b = f"model.layers.{i}.", f"blk.{i}."
        for ours, theirs in (("input_layernorm", "attn_norm"), ("post_attention_layernorm", "ffn_norm")):
            add(f"{p}{ours}.weight", f"{b}{theirs}.weight", ones, True)
        for ours, theirs, shape in (("q", "q", (H * hd, D)), ("k", "k", (KV * hd, D)), ("v", "v", (KV * hd, D)), ("o", "output", (D, H * hd))):
            add(f"{p}self_attn.{ours}_proj.weight", f"{b}attn_{theirs}.weight", normal(*shape))
        for x in "qk" if qwen else "":
            add(f"{p}self_attn.{x}_norm.weight", f"{b}attn_{x}_norm.weight", ones[:hd], True)
        moe = p + ("mlp" if qwen else "block_sparse_moe")
        add(f"{moe}.gate.weight", f"{b}ffn_gate_inp.weight", normal(E, D), True)
        names = ("gate_proj", "up_proj", "down_proj") if qwen else ("w1", "w3", "w2")
        for ours, theirs, shape in zip(names, ("gate", "up", "down"), ((F, D), (F, D), (D, F))):
            experts = [normal(*shape) for _ in range(E)]
            tensors |= {f"{moe}.experts.{e}.{ours}.weight": expert for e, expert in enumerate(experts)}
            add(None, f"{b}ffn_{theirs}_exps.weight", np.stack(experts))
    w.write_header_to_file(); w.write_kv_data_to_file(); w.write_tensors_to_file(); w.close()
    os.makedirs(directory, exist_ok=True)
    write_safetensors(f"{directory}/model.safetensors", tensors)
    config = dict(model_type=model_type, hidden_size=D, num_hidden_layers=L, num_attention_heads=H, num_key_value_heads=KV, head_dim=hd, vocab_size=V,
                  intermediate_size=F, moe_intermediate_size=F, num_experts=E, num_local_experts=E, num_experts_per_tok=K, norm_topk_prob=True,
                  hidden_act="silu", max_position_embeddings=4096, rms_norm_eps=1e-5, rope_theta=1e6, sliding_window=None,
                  tie_word_embeddings=False, torch_dtype="bfloat16")
    with open(f"{directory}/config.json", "w") as f: json.dump(config, f, indent=2)
    model = dict(type="WordLevel", vocab={word: i for i, word in enumerate(words)}, unk_token="t0")
    with open(f"{directory}/tokenizer.json", "w") as f: json.dump(dict(version="1.0", added_tokens=[], pre_tokenizer=dict(type="Whitespace"), model=model), f)
    return directory, file


def quantised(file, kind, programs, threads):
    """The GGUF of another type of weights."""
    target = file.replace("bf16", kind)
    if not os.path.exists(target):
        run(f"{programs}/llama-quantize", file, f"{target}.partial", kind.upper(), threads, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        os.rename(f"{target}.partial", target)
    return target


def one_round(a, programs, model, file, repack, number):
    """Rows of what both do in turn: {row: (ours, [theirs in each setting])}."""
    said = lambda *command: json.loads(run(*command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL).stdout)
    ours = said(a.upcycle, "bench", model, "-j", a.threads, "-p", a.prompt, "-n", a.tokens, "--parallel", 1, "--repeat", 1, "--json")
    speed = ours["speed"][0]
    theirs = []
    for setting in repack:
        rows = said(f"{programs}/llama-bench", "-m", file, "-t", a.threads, "-p", a.prompt, "-n", a.tokens, "-r", 1, "-o", "json", "--repack", setting)
        theirs.append({"decode" if row["n_gen"] else "prefill": row["avg_ts"] for row in rows})
    rows = {f"{kind}, tokens/s": (speed[kind], [their[kind] for their in theirs]) for kind in ("prefill", "decode")}
    rows["decode, share of the bandwidth"] = (speed["decode"] * ours["bytes_per_token"] / ours["bandwidth"], None)
    if not a.no_servers:
        context, prompts = 256, bench_serve.draw(number, a.clients, 128)
        commands = [lambda port: [a.upcycle, "serve", model, "--port", port, "-j", a.threads, "--parallel", a.clients, "--lookup", 0]]
        for setting in repack:
            option = ["--no-repack"] if setting == 0 else []
            commands.append(lambda port, option=option: [f"{programs}/llama-server", "-m", file, "--port", port, "-t", a.threads, "-np", a.clients,
                                                         "-c", context * a.clients, *option])
        ours, *theirs = (bench_serve.round_of([str(part) for part in command(port)], port, prompts, 64)
                         for command in commands for port in [bench_serve.free_port()])
        rows |= {f"{a.clients} clients: {row}": (value, [their[row] for their in theirs]) for row, value in ours.items()}
    return rows


def main():
    a = argparse.ArgumentParser()
    a.add_argument("work"); a.add_argument("--upcycle", required=True); a.add_argument("--llama-bin")
    a.add_argument("--models", default=",".join(MODELS)); a.add_argument("--types", default="bf16,q8_0,q4_k_m")
    a.add_argument("--rounds", type=int, default=5); a.add_argument("--threads", type=int, default=2); a.add_argument("--clients", type=int, default=8)
    a.add_argument("--prompt", type=int, default=512); a.add_argument("--tokens", type=int, default=32); a.add_argument("--no-servers", action="store_true")
    a = a.parse_args()
    os.makedirs(a.work, exist_ok=True)
    llama = source(a.work)
    programs = a.llama_bin or build(llama, a.threads)
    for name, kind in ((name, kind) for name in a.models.split(",") for kind in a.types.split(",")):
        model, file = make(name, a.work, llama)
        if kind != "bf16": model = file = quantised(file, kind, programs, a.threads)
        # Of eight bits and more nothing is repacked.
        repack = (1, 0) if kind.startswith("q4") else (1,)
        rounds = [one_round(a, programs, model, file, repack, number) for number in range(a.rounds)]
        for row in rounds[0]:
            ours = [r[row][0] for r in rounds]
            line = f"{name} {kind:7} {row:46} ours {statistics.median(ours):9.2f}"
            if rounds[0][row][1] is not None:
                settings = list(zip(*(r[row][1] for r in rounds)))
                best = (max if "tokens/s" in row else min)(settings, key=statistics.median)
                ratios = sorted(x / y for x, y in zip(ours, best))
                line += f"  llama.cpp {statistics.median(best):9.2f}  ratio {statistics.median(ratios):.2f} ({ratios[0]:.2f}-{ratios[-1]:.2f})"
            print(line, flush=True)


if __name__ == "__main__":
    main()
