"""Every method of PEFT as an adapter: derived settings, attaching, prompts, the files of stock PEFT."""
