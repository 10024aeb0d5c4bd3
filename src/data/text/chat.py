"""The special tokens that conversations with pictures and sound are written with, and the form of a conversation."""

ROLES = ("<|im_start|>", "<|im_end|>")  # around each message, the role first
MEDIA = ("<|image_start|>", "<|image|>", "<|image_end|>", "<|audio_start|>", "<|audio|>", "<|audio_end|>",
         "<|speech_start|>", "<|speech|>", "<|speech_end|>")
FREE = tuple(f"<|reserved_{number}|>" for number in range(64 - len(ROLES + MEDIA)))
SPECIAL_TOKENS = ROLES + MEDIA + FREE

# Jinja, as transformers' `apply_chat_template` reads it: ChatML, which Qwen's models use too.
TEMPLATE = ("{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
            "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")
