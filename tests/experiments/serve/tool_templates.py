"""Chat templates, one for each format of calls: short, and with the words by which it is known."""

HERMES = """\
{%- if tools %}<|im_start|>system
Tools:{% for tool in tools %}
{{ tool | tojson }}{% endfor %}
Answer with <tool_call>
{"name": <function-name>, "arguments": <args-json-object>}
</tool_call><|im_end|>
{% endif %}
{%- for m in messages %}<|im_start|>{{ 'user' if m.role == 'tool' else m.role }}
{% if m.role == 'tool' %}<tool_response>
{{ m.content }}
</tool_response>{% else %}{{ m.content }}{% endif %}
{%- for call in m.tool_calls %}{{ '\n' }}<tool_call>
{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}}
</tool_call>{% endfor %}<|im_end|>
{% endfor %}
{%- if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""

LLAMA = """\
{%- if tools %}<|im_start|>system
Respond in the format {"name": function name, "parameters": dictionary of argument name and its \
value}.
{% for tool in tools %}{{ tool | tojson(indent=4) }}
{% endfor %}<|im_end|>{% endif %}
{%- for m in messages %}
{%- if m.tool_calls is defined %}
{%- if m.tool_calls | length != 1 %}{{ raise_exception('one call at a time') }}{% endif %}
{%- set f = m.tool_calls[0].function %}<|im_start|>assistant
{"name": "{{ f.name }}", "parameters": {{ f.arguments | tojson }}}<|im_end|>
{%- elif m.role == 'tool' %}<|im_start|>ipython
{{ m.content | tojson if m.content is mapping else m.content }}<|im_end|>
{%- else %}<|im_start|>{{ m.role }}
{{ m.content | trim }}<|im_end|>{% endif %}{% endfor %}
{%- if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""

MISTRAL = """\
{%- for m in messages %}
{%- if m.role == 'user' %}{% if tools and loop.last %}[AVAILABLE_TOOLS]{{ tools | tojson }}\
[/AVAILABLE_TOOLS]{% endif %}[INST]{{ m.content }}[/INST]
{%- elif m.role == 'tool' %}
{%- if m.tool_call_id | length != 9 %}{{ raise_exception('ids have length 9') }}{% endif %}
[TOOL_RESULTS]{"content": {{ m.content | tojson }}, "call_id": "{{ m.tool_call_id }}"}\
[/TOOL_RESULTS]
{%- elif m.tool_calls %}[TOOL_CALLS][
{%- for call in m.tool_calls %}
{%- if call.id | length != 9 %}{{ raise_exception('ids have length 9') }}{% endif %}
{"name": {{ call.function.name | tojson }}, "arguments": {{ call.function.arguments | tojson }}, \
"id": "{{ call.id }}"}{{ ', ' if not loop.last }}{% endfor %}]
{%- else %}{{ m.content }}{% endif %}{% endfor %}"""

MISTRAL_TEXT = """\
{%- for m in messages %}
{%- if m.role == 'tool' %}[TOOL_RESULTS]{{ m.tool_call_id + '[TOOL_CONTENT]' + m.content }}\
[/TOOL_RESULTS]
{%- else %}{{ m.content }}{% for call in m.tool_calls %}\
{{ '[TOOL_CALLS]' + call.function.name + '[ARGS]' + call.function.arguments }}{% endfor %}
{%- endif %}{% endfor %}{{ tools | tojson if tools }}"""

HARMONY = """\
{%- if tools %}<|start|>developer<|message|># Tools in namespace functions
{% for tool in tools %}type {{ tool.function.name }} = {{ tool.function.parameters | tojson }}
{% endfor %}<|end|>{% endif %}
{%- for m in messages %}
{%- if m.role == 'tool' %}<|start|>functions.{{ m.name }} to=assistant<|channel|>commentary\
<|message|>{{ m.content | tojson }}<|end|>
{%- else %}
{%- if m.content %}<|start|>{{ m.role }}<|message|>{{ m.content }}<|end|>{% endif %}
{%- for call in m.tool_calls %}<|start|>assistant<|channel|>commentary \
to=functions.{{ call.function.name }} <|constrain|>json<|message|>\
{{ call.function.arguments | tojson }}<|call|>{% endfor %}{% endif %}{% endfor %}\
{% if add_generation_prompt %}<|start|>assistant{% endif %}"""

CODER = """\
{%- if tools %}<|im_start|>system
{% for tool in tools %}<function>{{ tool.function.name }}: {{ tool.function.parameters | tojson }}
</function>{% endfor %}
<tool_call>
<function=example_function_name>
<parameter=example_parameter_1>
value_1
</parameter>
</function>
</tool_call><|im_end|>
{% endif %}
{%- for m in messages %}<|im_start|>{{ m.role }}
{{ m.content }}
{%- for call in m.tool_calls %}
<tool_call>
<function={{ call.function.name }}>
{%- for name, value in call.function.arguments | items %}
<parameter={{ name }}>
{{ value | tojson if value is mapping or value is iterable and value is not string else value }}
</parameter>
{%- endfor %}
</function>
</tool_call>{% endfor %}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""

NO_TOOLS = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant:"
UNKNOWN = NO_TOOLS + "{% if tools %}<|tool|>{{ tools | tojson }}{% endif %}"

TEMPLATES = {
    "hermes": HERMES,
    "llama": LLAMA,
    "mistral": MISTRAL,
    "harmony": HARMONY,
    "coder": CODER,
}
