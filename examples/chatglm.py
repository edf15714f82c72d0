"""LoRA on a ChatGLM INT4 folder, merged and saved in its layout. / 在 ChatGLM INT4 上训练 LoRA，合并后原样保存。

Run `python examples/chatglm.py chatglm2-6b-int4 merged`; ChatGLM-6B works as well. With a 6B model on a CPU this is a
matter of hours. / ChatGLM-6B 同样适用；6B 模型在 CPU 上需要几个小时。
"""

import sys

import torch

import qgraft

folder, target = sys.argv[1:3]
question = "你是谁？"


def ask():
    """One answer, always the likeliest tokens. / 回答一个问题，每步取概率最大的 token。"""
    messages = [{"role": "user", "content": question}]
    inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt")
    with torch.inference_mode():
        output = model.generate(**inputs, max_new_tokens=32)
    return tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


# The folder's Python files are never run, its pickle may hold tensors only. / 不执行目录里的代码，pickle 里只允许有张量。
model, tokenizer = qgraft.load(folder, device="cpu")
print("before / 训练前:", ask())

# Every QuantizedLinear called query_key_value gets a LoRA. / 给每个 query_key_value 挂上 LoRA。
qgraft.attach_lora(model, r=8, lora_alpha=32, lora_dropout=0.0, target_modules="query_key_value")
names = {"name": "Aria", "author": "the Foo team"}
arguments = qgraft.TrainArguments(
    output_dir="chatglm-out", overwrite_output_dir=True, use_cpu=True, **names,
    learning_rate=1e-3, num_train_epochs=2, gradient_checkpointing=True, max_tokens_per_pass=128,
)  # fmt: skip
qgraft.train(model, tokenizer, "identity_zh", arguments, eval_dataset="identity_zh_heldout")
print("after / 训练后:", ask())

# Into the INT4 weights, in the same bytes. / 合并进 INT4 权重，大小不变。
report = qgraft.merge_lora(model, calibration="identity_zh", eval_dataset="identity_zh_heldout", **names)
print("kept / 保留:", report.retained_gain)
print("merged / 合并后:", ask())
print(qgraft.save(model, target))
