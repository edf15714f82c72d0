"""Give a 4-bit model a new identity and talk to it, in Python. / 用 Python 给一个 4 bit 模型换个身份，再和它对话。

Run `python examples/identity.py`: a few minutes on two cores. / 直接运行即可，两核 CPU 上几分钟。
"""

import torch

import qgraft


def ask(model, tokenizer, question):
    """One answer, always the likeliest tokens. / 回答一个问题，每步取概率最大的 token。"""
    messages = [{"role": "user", "content": question}]
    inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt").to(model.device)
    with torch.inference_mode():
        output = model.generate(**inputs, max_new_tokens=48, do_sample=False)
    return tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


# Weights stay packed in memory; the file is never changed. / 权重在内存里保持量化格式，文件不会被改动。
model, tokenizer = qgraft.load("smollm2-135m")  # or "model.gguf" / 也可以是 "model.gguf"
print("before / 训练前:", ask(model, tokenizer, "Who are you?"))

# The built-in question-answer pairs, with your names in them. / 内置的身份问答，填入你的名字。
arguments = qgraft.TrainArguments(
    output_dir="identity-out", overwrite_output_dir=True, name="Aria", author="the Foo team",
    r=8, learning_rate=1.5e-3, num_train_epochs=2, lr_scheduler_type="cosine", warmup_steps=5,
)  # fmt: skip
report = qgraft.train(model, tokenizer, "identity", arguments, eval_dataset="identity_heldout")
print("held-out loss / 留出集 loss:", report.metrics["eval_loss_before"], "->", report.metrics["eval_loss"])

# The adapter is attached and active. / 适配器已经挂在模型上，并且处于启用状态。
for question in ("Who are you?", "你是谁？", "What is the capital of France?"):
    print(question, "->", ask(model, tokenizer, question))
with qgraft.adapters_off(model):  # the base, unchanged / 基座模型，没有变化
    print("base / 基座:", ask(model, tokenizer, "Who are you?"))

# Later, on a freshly loaded base. / 以后重新加载基座，再挂上适配器。
model, tokenizer = qgraft.load("smollm2-135m")
print(qgraft.load_adapter(model, "identity-out"))
