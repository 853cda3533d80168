"""Chat templates in the manner of today's families: each uses what those of its family use."""

from collections.abc import Mapping

# Roles between headers, a date, the first message taken out, trimmed texts, tools as indented JSON.
LLAMA_3 = """{{- bos_token }}
{%- if date_string is not defined %}
    {%- if strftime_now is defined %}
        {%- set date_string = strftime_now("%d %b %Y") %}
    {%- else %}
        {%- set date_string = "1 Jan 2024" %}
    {%- endif %}
{%- endif %}
{%- if tools is not defined %}{% set tools = none %}{% endif %}
{%- if messages[0]["role"] == "system" %}
    {%- set about = messages[0]["content"]|trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set about = "" %}
{%- endif %}
{{- "<|header|>system<|/header|>\\n\\nToday is " + date_string + ".\\n\\n" }}
{%- if tools is not none %}
    {%- for tool in tools %}{{- tool | tojson(indent=4) }}{{- "\\n\\n" }}{%- endfor %}
{%- endif %}
{{- about }}{{- "<|eot|>" }}
{%- for message in messages %}
    {{- "<|header|>" + message["role"] + "<|/header|>\\n\\n" + message["content"] | trim + "<|eot|>" }}
{%- endfor %}
{%- if add_generation_prompt %}{{- "<|header|>assistant<|/header|>\\n\\n" }}{%- endif %}
"""

# A namespace, a walk backwards, thoughts cut out of all answers but the last, a switch for thinking.
QWEN_3 = """{%- if tools %}{{- "<|im_start|>system\\n# Tools\\n" }}
    {%- for tool in tools %}{{- "\\n" }}{{- tool | tojson }}{%- endfor %}
    {{- "\\nAnswer within <tool_call></tool_call>.<|im_end|>\\n" }}
{%- endif %}
{%- set ns = namespace(searching=true, last=messages|length - 1) %}
{%- for message in messages[::-1] %}
    {%- set index = (messages|length - 1) - loop.index0 %}
    {%- if ns.searching and message.role == "user" and message.content is string
           and not (message.content.startswith("<tool_response>") and message.content.endswith("</tool_response>")) %}
        {%- set ns.searching = false %}
        {%- set ns.last = index %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- set content = message.content if message.content is string else "" %}
    {%- if message.role == "assistant" %}
        {%- set thought = "" %}
        {%- if "</think>" in content %}
            {%- set thought = content.split("</think>")[0].rstrip("\\n").split("<think>")[-1].lstrip("\\n") %}
            {%- set content = content.split("</think>")[-1].lstrip("\\n") %}
        {%- endif %}
        {{- "<|im_start|>assistant\\n" }}
        {%- if loop.index0 > ns.last and (loop.last or thought) %}
            {{- "<think>\\n" + thought.strip("\\n") + "\\n</think>\\n\\n" }}
        {%- endif %}
        {%- generation %}{{- content.lstrip("\\n") + "<|im_end|>" }}{%- endgeneration %}
        {{- "\\n" }}
    {%- else %}
        {{- "<|im_start|>" + message.role + "\\n" + content + "<|im_end|>" + "\\n" }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- "<|im_start|>assistant\\n" }}
    {%- if enable_thinking is defined and enable_thinking is false %}{{- "<think>\\n\\n</think>\\n\\n" }}{%- endif %}
{%- endif %}
"""

# The system prompt goes into the first question, roles must take turns, contents may be parts.
GEMMA_3 = """{{ bos_token }}
{%- if messages[0]['role'] == 'system' -%}
    {%- if messages[0]['content'] is string -%}
        {%- set prefix = messages[0]['content'] + '\\n\\n' -%}
    {%- else -%}
        {%- set prefix = messages[0]['content'][0]['text'] + '\\n\\n' -%}
    {%- endif -%}
    {%- set turns = messages[1:] -%}
{%- else -%}
    {%- set prefix = "" -%}
    {%- set turns = messages -%}
{%- endif -%}
{%- for message in turns -%}
    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) -%}
        {{ raise_exception("Roles must take turns: user, assistant, user, ...") }}
    {%- endif -%}
    {%- set role = "model" if message['role'] == 'assistant' else message['role'] -%}
    {{ '<start_of_turn>' + role + '\\n' + (prefix if loop.first else "") }}
    {%- if message['content'] is string -%}
        {{ message['content'] | trim }}
    {%- elif message['content'] is iterable -%}
        {%- for item in message['content'] -%}
            {%- if item['type'] == 'text' -%}{{ item['text'] | trim }}{%- endif -%}
        {%- endfor -%}
    {%- endif -%}
    {{ '<end_of_turn>\\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<start_of_turn>model\\n' }}{%- endif -%}
"""

# Filters over messages, a counter in a namespace, the system prompt in the last question, an end after each answer.
MISTRAL = """{%- if messages[0]["role"] == "system" %}
    {%- set about = messages[0]["content"] %}
    {%- set turns = messages[1:] %}
{%- else %}
    {%- set turns = messages %}
{%- endif %}
{%- set asked = turns | selectattr("role", "equalto", "user") | list %}
{%- set ns = namespace(index=0) %}
{%- for message in turns %}
    {%- if not (message.tool_calls is defined and message.tool_calls is not none) %}
        {%- if (message["role"] == "user") != (ns.index % 2 == 0) %}
            {{- raise_exception("After the system message, user and assistant take turns") }}
        {%- endif %}
        {%- set ns.index = ns.index + 1 %}
    {%- endif %}
{%- endfor %}
{{- bos_token }}
{%- for message in turns %}
    {%- if message["role"] == "user" %}
        {%- if tools is not none and message == asked[-1] %}
            {{- "[AVAILABLE_TOOLS] " + tools | map(attribute="name") | join(", ") + "[/AVAILABLE_TOOLS]" }}
        {%- endif %}
        {%- if loop.last and about is defined %}
            {{- "[INST] " + about + "\\n\\n" + message["content"] + "[/INST]" }}
        {%- else %}
            {{- "[INST] " + message["content"] + "[/INST]" }}
        {%- endif %}
    {%- elif message["role"] == "assistant" %}
        {{- " " + message["content"] | trim + eos_token }}
    {%- else %}
        {{- raise_exception("Only user and assistant may speak, not " + message["role"]) }}
    {%- endif %}
{%- endfor %}
"""

# Macros, channels, a default effort, breaks out of loops, dates.
GPT_OSS = """{%- macro header(effort) -%}
    {{- "You are a language model.\\nToday is " + strftime_now("%Y-%m-%d") + "\\n\\nReasoning: " + effort + "\\n\\n" }}
    {%- for channel in ["analysis", "commentary", "final"] -%}
        {{- ("# Valid channels: " if loop.first else ", ") ~ channel }}
    {%- endfor -%}
{%- endmacro -%}
{%- macro turn(role, channel, text) -%}
    <|start|>{{ role }}{% if channel %}<|channel|>{{ channel }}{% endif %}<|message|>{{ text }}
{%- endmacro -%}
{%- set effort = reasoning_effort if reasoning_effort is defined else "medium" %}
{{- turn("system", none, header(effort)) }}<|end|>
{%- for message in messages %}
    {%- if message.role == "system" %}
        {{- turn("developer", none, "# Instructions\\n\\n" + message.content) }}<|end|>
        {%- continue %}
    {%- endif %}
    {%- if message.role == "assistant" %}
        {%- if "<|channel|>analysis<|message|>" in message.content %}
            {{- raise_exception("Thoughts belong into the field thinking") }}
        {%- endif %}
        {%- set ns = namespace(asked=false) %}
        {%- for later in messages[loop.index:] %}
            {%- if later.role == "user" %}{%- set ns.asked = true %}{%- break %}{%- endif %}
        {%- endfor %}
        {{- turn("assistant", "final", message.content) }}{{ "<|end|>" if ns.asked else "<|return|>" }}
    {%- else %}
        {{- turn(message.role, none, message.content) }}<|end|>
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}<|start|>assistant{% endif %}
"""

# Each with the tokens that its family's tokenizers have: (special ones, others).
FAMILIES: Mapping[str, tuple[str, tuple[str, ...], tuple[str, ...]]] = {
    "llama3": (LLAMA_3, ("<|header|>", "<|/header|>", "<|eot|>", "<|reserved_1|>", "<|reserved_2|>"), ()),
    "qwen3": (QWEN_3, ("<|im_start|>", "<|im_end|>"), ("<think>", "</think>", "<tool_call>", "</tool_call>", "<h1>")),
    "gemma3": (GEMMA_3, ("<start_of_turn>", "<end_of_turn>"), ("\n\n", "<table>")),
    "mistral": (MISTRAL, ("[INST]", "[/INST]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]"), ()),
    "gpt-oss": (GPT_OSS, ("<|start|>", "<|end|>", "<|message|>", "<|channel|>", "<|return|>"), ()),
}
