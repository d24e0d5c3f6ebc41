#!/usr/bin/env python3
"""upcycle against llama.cpp on one machine: BF16 prefill of 512 tokens and decoding of one sequence, two threads.

usage: bench_llama.py WORK --upcycle BIN [--llama-bench BIN] [--models moe-1b,qwen3moe-1b] [--rounds 5] [--threads 2]

Makes the random-weight models in WORK (once), as a directory for us and as GGUF for llama.cpp, from the same bytes; builds llama.cpp there
from the source package of llama-cpp-python unless a llama-bench is given; then runs both in turn and prints medians and the median of the
rounds' ratios. Needs torch, safetensors, numpy; for the build pip, cmake, ninja and a C++ compiler.
"""
import argparse, glob, json, os, statistics, subprocess, sys
import numpy as np, torch
from safetensors.torch import save_file

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
    target = f"{llama}/build/bin/llama-bench"
    if not os.path.exists(target):
        # A .git of the package's own repository misleads its cmake files.
        run("rm", "-rf", f"{llama}/.git")
        run("cmake", "-G", "Ninja", "-S", llama, "-B", f"{llama}/build", *[f"-D{option}" for option in OPTIONS])
        run("cmake", "--build", f"{llama}/build", "-j", threads, "--target", "llama-bench")
    return target


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

    def normal(*shape):
        return torch.from_numpy(rng.standard_normal(shape, dtype=np.float32) * 0.02).bfloat16()

    def add(ours, theirs, tensor, wide=False):
        if ours: tensors[ours] = tensor
        if wide: w.add_tensor(theirs, tensor.float().numpy())
        else: w.add_tensor(theirs, tensor.contiguous().view(torch.int16).numpy().view(np.uint8), raw_dtype=gguf.GGMLQuantizationType.BF16)

    add("model.embed_tokens.weight", "token_embd.weight", normal(V, D))
    add("lm_head.weight", "output.weight", normal(V, D))
    add("model.norm.weight", "output_norm.weight", torch.ones(D).bfloat16(), True)
    for i in range(L):
        p, b = f"model.layers.{i}.", f"blk.{i}."
        for ours, theirs in (("input_layernorm", "attn_norm"), ("post_attention_layernorm", "ffn_norm")):
            add(f"{p}{ours}.weight", f"{b}{theirs}.weight", torch.ones(D).bfloat16(), True)
        for ours, theirs, shape in (("q", "q", (H * hd, D)), ("k", "k", (KV * hd, D)), ("v", "v", (KV * hd, D)), ("o", "output", (D, H * hd))):
            add(f"{p}self_attn.{ours}_proj.weight", f"{b}attn_{theirs}.weight", normal(*shape))
        for x in "qk" if qwen else "":
            add(f"{p}self_attn.{x}_norm.weight", f"{b}attn_{x}_norm.weight", torch.ones(hd).bfloat16(), True)
        moe = p + ("mlp" if qwen else "block_sparse_moe")
        add(f"{moe}.gate.weight", f"{b}ffn_gate_inp.weight", normal(E, D), True)
        names = ("gate_proj", "up_proj", "down_proj") if qwen else ("w1", "w3", "w2")
        for ours, theirs, shape in zip(names, ("gate", "up", "down"), ((F, D), (F, D), (D, F))):
            experts = [normal(*shape) for _ in range(E)]
            tensors |= {f"{moe}.experts.{e}.{ours}.weight": expert for e, expert in enumerate(experts)}
            add(None, f"{b}ffn_{theirs}_exps.weight", torch.stack(experts))
    w.write_header_to_file(); w.write_kv_data_to_file(); w.write_tensors_to_file(); w.close()
    os.makedirs(directory, exist_ok=True)
    save_file(tensors, f"{directory}/model.safetensors", {"format": "pt"})
    config = dict(model_type=model_type, hidden_size=D, num_hidden_layers=L, num_attention_heads=H, num_key_value_heads=KV, head_dim=hd, vocab_size=V,
                  intermediate_size=F, moe_intermediate_size=F, num_experts=E, num_local_experts=E, num_experts_per_tok=K, norm_topk_prob=True,
                  hidden_act="silu", max_position_embeddings=4096, rms_norm_eps=1e-5, rope_theta=1e6, sliding_window=None,
                  tie_word_embeddings=False, torch_dtype="bfloat16")
    with open(f"{directory}/config.json", "w") as f: json.dump(config, f, indent=2)
    model = dict(type="WordLevel", vocab={word: i for i, word in enumerate(words)}, unk_token="t0")
    with open(f"{directory}/tokenizer.json", "w") as f: json.dump(dict(version="1.0", added_tokens=[], pre_tokenizer=dict(type="Whitespace"), model=model), f)
    return directory, file


def main():
    a = argparse.ArgumentParser()
    a.add_argument("work"); a.add_argument("--upcycle", required=True); a.add_argument("--llama-bench")
    a.add_argument("--models", default=",".join(MODELS)); a.add_argument("--rounds", type=int, default=5); a.add_argument("--threads", type=int, default=2)
    a.add_argument("--prompt", type=int, default=512); a.add_argument("--tokens", type=int, default=32)
    a = a.parse_args()
    os.makedirs(a.work, exist_ok=True)
    llama = source(a.work)
    bench = a.llama_bench or build(llama, a.threads)
    said = lambda *command: json.loads(run(*command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL).stdout)
    for name in a.models.split(","):
        directory, file = make(name, a.work, llama)
        rounds = []
        for _ in range(a.rounds):
            ours = said(a.upcycle, "bench", directory, "-j", a.threads, "-p", a.prompt, "-n", a.tokens, "--parallel", 1, "--repeat", 1, "--json")
            theirs = said(bench, "-m", file, "-t", a.threads, "-p", a.prompt, "-n", a.tokens, "-r", 1, "-o", "json")
            speed = {"decode" if row["n_gen"] else "prefill": row["avg_ts"] for row in theirs}
            share = ours["speed"][0]["decode"] * ours["bytes_per_token"] / ours["bandwidth"]
            rounds.append({kind: (ours["speed"][0][kind], speed[kind]) for kind in ("prefill", "decode")} | {"share": share})
        for kind in ("prefill", "decode"):
            ours, theirs = zip(*(r[kind] for r in rounds))
            ratios = sorted(x / y for x, y in zip(ours, theirs))
            print(f"{name} {kind}: ours {statistics.median(ours):.1f}, llama.cpp {statistics.median(theirs):.1f} tokens/s, "
                  f"ratio {statistics.median(ratios):.2f} ({ratios[0]:.2f}-{ratios[-1]:.2f})", flush=True)
        print(f"{name} decode: {100 * statistics.median(r['share'] for r in rounds):.0f} % of the bandwidth measured beside it", flush=True)


if __name__ == "__main__":
    main()
