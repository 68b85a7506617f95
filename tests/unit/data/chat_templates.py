# ruff: noqa: E501 - templates are quoted as they are published
"""Well-known chat templates as their models publish them, with the special tokens they need."""

from __future__ import annotations

TEMPLATES: dict[str, tuple[str, str, str, tuple[str, ...]]] = {
    # name: (template, bos, eos, further special tokens)
    "chatml": (
        "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}"
        "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
        "<s>",
        "<|im_end|>",
        ("<|im_start|>",),
    ),
    "llama-2": (
        "{% if messages[0]['role'] == 'system' %}{% set loop_messages = messages[1:] %}"
        "{% set system_message = messages[0]['content'] %}{% else %}{% set loop_messages = messages %}"
        "{% set system_message = false %}{% endif %}{% for message in loop_messages %}"
        "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
        "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
        "{% if loop.index0 == 0 and system_message != false %}"
        "{% set content = '<<SYS>>\n' + system_message + '\n<</SYS>>\n\n' + message['content'] %}"
        "{% else %}{% set content = message['content'] %}{% endif %}{% if message['role'] == 'user' %}"
        "{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}{% elif message['role'] == 'assistant' %}"
        "{{ ' ' + content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}",
        "<s>",
        "</s>",
        (),
    ),
    "llama-3": (
        "{% set loop_messages = messages %}{% for message in loop_messages %}{% set content = '<|start_header_id|>' +"
        " message['role'] + '<|end_header_id|>\n\n'+ message['content'] | trim + '<|eot_id|>' %}{% if loop.index0 == 0 %}"
        "{% set content = bos_token + content %}{% endif %}{{ content }}{% endfor %}{% if add_generation_prompt %}"
        "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}",
        "<|begin_of_text|>",
        "<|end_of_text|>",
        ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    ),
    "mistral": (
        "{{ bos_token }}{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
        "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
        "{% if message['role'] == 'user' %}{{ '[INST] ' + message['content'] + ' [/INST]' }}"
        "{% elif message['role'] == 'assistant' %}{{ message['content'] + eos_token}}{% else %}"
        "{{ raise_exception('Only user and assistant roles are supported!') }}{% endif %}{% endfor %}",
        "<s>",
        "</s>",
        ("[INST]", "[/INST]"),
    ),
    "gemma": (
        "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}"
        "{% endif %}{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
        "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
        "{% if (message['role'] == 'assistant') %}{% set role = 'model' %}{% else %}{% set role = message['role'] %}"
        "{% endif %}{{ '<start_of_turn>' + role + '\n' + message['content'] | trim + '<end_of_turn>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{'<start_of_turn>model\n'}}{% endif %}",
        "<bos>",
        "<eos>",
        ("<start_of_turn>", "<end_of_turn>"),
    ),
    "zephyr": (
        "{% for message in messages %}\n{% if message['role'] == 'user' %}\n{{ '<|user|>\n' + message['content'] + eos_token }}"
        "\n{% elif message['role'] == 'system' %}\n{{ '<|system|>\n' + message['content'] + eos_token }}\n"
        "{% elif message['role'] == 'assistant' %}\n{{ '<|assistant|>\n'  + message['content'] + eos_token }}\n{% endif %}\n"
        "{% if loop.last and add_generation_prompt %}\n{{ '<|assistant|>' }}\n{% endif %}\n{% endfor %}",
        "<s>",
        "</s>",
        (),
    ),
    "phi-3": (
        "{% for message in messages %}{% if message['role'] == 'system' %}{{'<|system|>\n' + message['content'] + '<|end|>\n'}}"
        "{% elif message['role'] == 'user' %}{{'<|user|>\n' + message['content'] + '<|end|>\n'}}"
        "{% elif message['role'] == 'assistant' %}{{'<|assistant|>\n' + message['content'] + '<|end|>\n'}}{% endif %}"
        "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}",
        "<s>",
        "<|endoftext|>",
        ("<|system|>", "<|user|>", "<|assistant|>", "<|end|>"),
    ),
    "qwen2.5": (
        "{%- if messages[0]['role'] == 'system' %}\n    {{- '<|im_start|>system\n' + messages[0]['content'] + '<|im_end|>\n' }}\n"
        "{%- else %}\n    {{- '<|im_start|>system\nYou are Qwen, created by Alibaba Cloud. You are a helpful assistant."
        '<|im_end|>\n\' }}\n{%- endif %}\n{%- for message in messages %}\n    {%- if (message.role == "user") or'
        ' (message.role == "system" and not loop.first) or (message.role == "assistant") %}\n        {{- \'<|im_start|>\' +'
        " message.role + '\n' + message.content + '<|im_end|>' + '\n' }}\n    {%- endif %}\n{%- endfor %}\n"
        "{%- if add_generation_prompt %}\n    {{- '<|im_start|>assistant\n' }}\n{%- endif %}\n",
        "<|endoftext|>",
        "<|im_end|>",
        ("<|im_start|>",),
    ),
    "qwen3": (
        "{%- if messages[0].role == 'system' %}\n    {{- '<|im_start|>system\n' + messages[0].content + '<|im_end|>\n' }}\n"
        "{%- endif %}\n{%- set ns = namespace(searching=true, last_query_index=messages|length - 1) %}\n{%- for message in messages[::-1] %}\n"
        '    {%- set index = (messages|length - 1) - loop.index0 %}\n    {%- if message.role == "user" and'
        " ns.searching %}\n        {%- set ns.searching = false %}\n        {%- set ns.last_query_index = index %}\n"
        '    {%- endif %}\n{%- endfor %}\n{%- for message in messages %}\n    {%- if message.role == "user" %}\n'
        "        {{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>' + '\n' }}\n"
        '    {%- elif message.role == "assistant" %}\n        {%- set content = message.content %}\n'
        "        {%- set reasoning_content = '' %}\n        {%- if '</think>' in message.content %}\n"
        "            {%- set content = message.content.split('</think>')[-1].lstrip('\n') %}\n"
        "            {%- set reasoning_content ="
        " message.content.split('</think>')[0].rstrip('\n').split('<think>')[-1].lstrip('\n') %}\n        {%- endif %}\n"
        "        {%- if loop.index0 > ns.last_query_index and (loop.last or reasoning_content) %}\n"
        "            {{- '<|im_start|>' + message.role + '\n<think>\n' + reasoning_content.strip('\n') + '\n</think>\n\n' +"
        " content.lstrip('\n') }}\n        {%- else %}\n            {{- '<|im_start|>' + message.role + '\n' + content }}\n"
        "        {%- endif %}\n        {{- '<|im_end|>\n' }}\n    {%- endif %}\n{%- endfor %}\n"
        "{%- if add_generation_prompt %}\n    {{- '<|im_start|>assistant\n' }}\n{%- endif %}\n",
        "<|endoftext|>",
        "<|im_end|>",
        ("<|im_start|>",),
    ),
    "alpaca, published": (
        "{{ 'Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n' }}"
        "{% for message in messages %}{% if message['role'] == 'user' %}"
        "{{ '### Instruction:\n' + message['content'] + '\n\n' }}{% elif message['role'] == 'assistant' %}"
        "{{ '### Response:\n' + message['content'] + '\n\n' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '### Response:\n' }}{% endif %}",
        "<s>",
        "</s>",
        (),
    ),
    "vicuna, published": (
        "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ messages[0]['content'] + ' ' }}"
        "{% set loop_messages = messages[1:] %}{% else %}{{ 'A chat between a curious user and an assistant. ' }}"
        "{% set loop_messages = messages %}{% endif %}{% for message in loop_messages %}{% if message['role'] == 'user' %}"
        "{{ 'USER: ' + message['content'].strip() + ' ' }}{% elif message['role'] == 'assistant' %}"
        "{{ 'ASSISTANT: ' + message['content'].strip() + eos_token }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}",
        "<s>",
        "</s>",
        (),
    ),
}

ENDS = {
    "chatml": "<|im_end|>",
    "llama-2": "</s>",
    "llama-3": "<|eot_id|>",
    "mistral": "</s>",
    "gemma": "<end_of_turn>",
    "zephyr": "</s>",
    "phi-3": "<|end|>",
    "qwen2.5": "<|im_end|>",
    "qwen3": "<|im_end|>",
    "alpaca, published": "",
    "vicuna, published": "</s>",
    "guanaco": "</s>",
    "alpaca": "</s>",
    "vicuna": "</s>",
}
"""What ends an answer, in the templates above and in ours."""
