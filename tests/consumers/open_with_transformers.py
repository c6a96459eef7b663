"""Opens model folders as a user of transformers does, whichever version this Python has; knows nothing of corral.

Reads from stdin JSON `{name: {"folder", "adapter", "chats", "ids"}}` and writes `{name: {"version", "prompts", "logprobs",
"answers"}}`: the ids of each chat's prompt, the log-probabilities of `ids` after the first, and what `generate` answers.
"""

import json
import sys

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer


def open_model(folder, adapter):
    model = AutoModelForCausalLM.from_pretrained(folder)
    if adapter is None:
        return model
    from peft import PeftModel

    return PeftModel.from_pretrained(model, adapter)


def results(folder, adapter, chats, ids):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = open_model(folder, adapter).eval()
    prompts, answers = [], []
    for chat in chats:
        prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
        text = tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
        inputs = tokenizer(text, add_special_tokens=False, return_tensors="pt")
        with torch.no_grad():
            whole = model.generate(**inputs, max_new_tokens=24)
        prompts.append(list(prompt))
        answers.append(whole[0, len(prompt) :].tolist())
    with torch.no_grad():
        scores = model(torch.tensor([ids])).logits[0, :-1].float().log_softmax(-1)
    logprobs = scores.gather(1, torch.tensor(ids[1:])[:, None])[:, 0].tolist()
    return {"version": transformers.__version__, "prompts": prompts, "logprobs": logprobs, "answers": answers}


transformers.logging.set_verbosity_error()
json.dump({name: results(**case) for name, case in json.load(sys.stdin).items()}, sys.stdout)
