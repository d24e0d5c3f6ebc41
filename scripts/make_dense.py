#!/usr/bin/env python3
"""Random-weight dense checkpoints: one base and N "fine-tunes" (the base plus small noise), of any size.

usage: make_dense.py FAMILY OUT [--hidden 64 --layers 2 --inter 176 --heads 4 --kv 2 --head-dim 0 --vocab 1000]
                     [--n 4 --noise 0.05 --shards 1 --dtype bfloat16 --seed 7] [--tie] [--extra-token] [--lora]
FAMILY: llama, llama3 (scaled rope), mistral, qwen2, qwen3

Writes OUT/base and OUT/ft0 .. ft(N-1): config.json (4.x spelling), model*.safetensors, tokenizer.json,
tokenizer_config.json, special_tokens_map.json, generation_config.json. The tokenizer is a byte-level BPE trained on
Python's own standard library, so different Pythons give different tokenizers. `--extra-token`: ft0 has one more token
and embedding row. `--lora`: also OUT/lora0, a PEFT adapter on the base's MLPs. For tests of composing and for timing;
the text such models write is noise.
"""
import argparse, glob, json, math, os, sysconfig
import torch
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

ARCHITECTURE = dict(llama="LlamaForCausalLM", llama3="LlamaForCausalLM", mistral="MistralForCausalLM",
                    qwen2="Qwen2ForCausalLM", qwen3="Qwen3ForCausalLM")
CHATML = ("{% for m in messages %}{{'<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
          "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}")
INST = ("{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}{{ '[INST] ' + m['content'] + ' [/INST]' }}"
        "{% else %}{{ ' ' + m['content'] + eos_token }}{% endif %}{% endfor %}")


def write_json(path, value):
    with open(path, "w") as f: json.dump(value, f, indent=2)


def corpus():
    for path in sorted(glob.glob(sysconfig.get_paths()["stdlib"] + "/*.py"))[:60]:
        with open(path, errors="ignore") as f: yield f.read()


def make_tokenizer(family, vocab):
    """(tokenizer, its tokenizer_config)"""
    qwen = family.startswith("qwen")
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"] if qwen else ["<unk>", "<s>", "</s>"]
    bos, eos, pad, unk = (None, "<|im_end|>", "<|endoftext|>", None) if qwen else ("<s>", "</s>", None, "<unk>")
    t = Tokenizer(models.BPE())
    t.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    t.decoder = decoders.ByteLevel()
    t.train_from_iterator(corpus(), trainers.BpeTrainer(vocab_size=vocab, special_tokens=special, show_progress=False,
                                                        initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    if bos:
        t.post_processor = processors.TemplateProcessing(single=f"{bos} $A", pair=f"{bos} $A {bos} $B",
                                                         special_tokens=[(bos, special.index(bos))])
    return t, dict(tokenizer_class="PreTrainedTokenizerFast", bos_token=bos, eos_token=eos, pad_token=pad, unk_token=unk,
                   model_max_length=4096, clean_up_tokenization_spaces=False, add_bos_token=bool(bos), add_eos_token=False,
                   chat_template=CHATML if qwen else INST)


def make_config(a, head_dim, bos, eos):
    c = dict(architectures=[ARCHITECTURE[a.family]], model_type=a.family.replace("llama3", "llama"), hidden_size=a.hidden,
             intermediate_size=a.inter, num_hidden_layers=a.layers, num_attention_heads=a.heads, num_key_value_heads=a.kv,
             hidden_act="silu", max_position_embeddings=2048, rms_norm_eps=1e-5, rope_theta=10000.0, vocab_size=a.vocab,
             tie_word_embeddings=a.tie, torch_dtype=a.dtype, use_cache=True, initializer_range=0.02, attention_dropout=0.0,
             bos_token_id=bos, eos_token_id=eos, transformers_version="4.51.3")
    llama = dict(attention_bias=False, mlp_bias=False, pretraining_tp=1, rope_scaling=None, head_dim=head_dim)
    qwen = dict(use_sliding_window=False, max_window_layers=a.layers, rope_theta=1000000.0, rms_norm_eps=1e-6)
    scaling = dict(factor=8.0, high_freq_factor=4.0, low_freq_factor=1.0, original_max_position_embeddings=512, rope_type="llama3")
    return c | dict(llama=llama, llama3=llama | dict(rope_theta=500000.0, rope_scaling=scaling),
                    mistral=dict(sliding_window=512, head_dim=head_dim), qwen2=qwen | dict(sliding_window=512),
                    qwen3=qwen | dict(sliding_window=None, head_dim=head_dim, attention_bias=False, rope_scaling=None))[a.family]


def shapes(a, head_dim):
    """{name: shape} in checkpoint order."""
    D, F, Q, KV = a.hidden, a.inter, a.heads * head_dim, a.kv * head_dim
    out = {"model.embed_tokens.weight": (a.vocab, D)}
    for i in range(a.layers):
        p = f"model.layers.{i}."
        attention = {"q_proj": (Q, D), "k_proj": (KV, D), "v_proj": (KV, D), "o_proj": (D, Q)}
        out[p + "input_layernorm.weight"] = (D,)
        for name, shape in attention.items():
            out[f"{p}self_attn.{name}.weight"] = shape
            if a.family == "qwen2" and name != "o_proj": out[f"{p}self_attn.{name}.bias"] = shape[:1]
        if a.family == "qwen3": out |= {p + "self_attn.q_norm.weight": (head_dim,), p + "self_attn.k_norm.weight": (head_dim,)}
        out[p + "post_attention_layernorm.weight"] = (D,)
        out |= {p + "mlp.gate_proj.weight": (F, D), p + "mlp.up_proj.weight": (F, D), p + "mlp.down_proj.weight": (D, F)}
    out["model.norm.weight"] = (D,)
    if not a.tie: out["lm_head.weight"] = (a.vocab, D)
    return out


def draw(name, shape, g):
    noise = torch.randn(shape, generator=g)
    if "norm" in name: return 1.0 + 0.1 * noise
    return noise * (1.0 if "embed" in name else 0.1 if len(shape) == 1 else 1.0 / math.sqrt(shape[-1]))


def save_weights(folder, tensors, shards):
    if shards == 1: return save_file(tensors, folder + "/model.safetensors", metadata={"format": "pt"})
    total, groups, size = sum(t.nbytes for t in tensors.values()), [{}], 0
    for name, t in tensors.items():
        if groups[-1] and size + t.nbytes > total / shards and len(groups) < shards: groups.append({}); size = 0
        groups[-1][name] = t
        size += t.nbytes
    where = {}
    for i, group in enumerate(groups):
        file = f"model-{i + 1:05d}-of-{len(groups):05d}.safetensors"
        save_file(group, f"{folder}/{file}", metadata={"format": "pt"})
        where |= dict.fromkeys(group, file)
    write_json(folder + "/model.safetensors.index.json", dict(metadata=dict(total_size=total), weight_map=where))


def save_model(folder, tensors, config, tokenizer, tokenizer_config, shards, extra=None):
    os.makedirs(folder, exist_ok=True)
    save_weights(folder, tensors, shards)
    write_json(folder + "/config.json", config)
    write_json(folder + "/generation_config.json", dict(bos_token_id=config["bos_token_id"], eos_token_id=config["eos_token_id"]))
    if extra:
        tokenizer = Tokenizer.from_str(tokenizer.to_str())
        tokenizer.add_special_tokens([AddedToken(extra, special=True)])
    added = {str(i): dict(content=t.content, lstrip=False, normalized=False, rstrip=False, single_word=False, special=True)
             for i, t in tokenizer.get_added_tokens_decoder().items()}
    tokenizer.save(folder + "/tokenizer.json")
    write_json(folder + "/tokenizer_config.json", tokenizer_config | dict(added_tokens_decoder=added))
    write_json(folder + "/special_tokens_map.json", {k: v for k, v in tokenizer_config.items()
                                                     if k in ("bos_token", "eos_token", "pad_token", "unk_token") and v})


def save_lora(folder, base, a, g, rank=4):
    os.makedirs(folder, exist_ok=True)
    tensors = {}
    for i in range(a.layers):
        for part, (rows, columns) in dict(gate_proj=(a.inter, a.hidden), up_proj=(a.inter, a.hidden), down_proj=(a.hidden, a.inter)).items():
            p = f"base_model.model.model.layers.{i}.mlp.{part}."
            tensors[p + "lora_A.weight"] = torch.randn(rank, columns, generator=g) * 0.05
            tensors[p + "lora_B.weight"] = torch.randn(rows, rank, generator=g) * 0.05
    save_file(tensors, folder + "/adapter_model.safetensors", metadata={"format": "pt"})
    write_json(folder + "/adapter_config.json",
               dict(base_model_name_or_path=os.path.abspath(base), peft_type="LORA", task_type="CAUSAL_LM", r=rank, lora_alpha=8,
                    lora_dropout=0.0, target_modules=["gate_proj", "up_proj", "down_proj"], bias="none", fan_in_fan_out=False,
                    inference_mode=True))


def main():
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("family", choices=sorted(ARCHITECTURE)); ap.add_argument("out")
    for name, value in dict(hidden=64, layers=2, inter=176, heads=4, kv=2, head_dim=0, vocab=1000, n=4, shards=1, seed=7).items():
        ap.add_argument("--" + name.replace("_", "-"), type=int, default=value)
    ap.add_argument("--noise", type=float, default=0.05); ap.add_argument("--dtype", default="bfloat16")
    for flag in ("--tie", "--extra-token", "--lora"): ap.add_argument(flag, action="store_true")
    a = ap.parse_args()
    head_dim, dtype = a.head_dim or a.hidden // a.heads, getattr(torch, a.dtype)
    tokenizer, tokenizer_config = make_tokenizer(a.family, a.vocab)
    bos, eos = (tokenizer.token_to_id(tokenizer_config[k]) if tokenizer_config[k] else None for k in ("bos_token", "eos_token"))
    config = make_config(a, head_dim, bos, eos)

    g = torch.Generator().manual_seed(a.seed)
    base = {n: draw(n, s, g) for n, s in shapes(a, head_dim).items()}
    save_model(a.out + "/base", {n: t.to(dtype) for n, t in base.items()}, config, tokenizer, tokenizer_config, a.shards)
    for k in range(a.n):
        g = torch.Generator().manual_seed(a.seed * 1000 + k + 1)
        tuned = {n: (t + a.noise * t.std() * torch.randn(t.shape, generator=g)).to(dtype) for n, t in base.items()}
        more = a.extra_token and k == 0
        for n in ("model.embed_tokens.weight", "lm_head.weight") if more else ():
            if n in tuned: tuned[n] = torch.cat([tuned[n], torch.zeros(1, a.hidden, dtype=dtype)])
        save_model(f"{a.out}/ft{k}", tuned, config | dict(vocab_size=a.vocab + more), tokenizer, tokenizer_config, a.shards,
                   "<|extra|>" if more else None)
    if a.lora: save_lora(a.out + "/lora0", a.out + "/base", a, g)
    print(f"{a.family}: {1 + a.n} models of {sum(t.numel() for t in base.values())} parameters in {a.out}")


if __name__ == "__main__":
    main()
