"""Trained models as folders of Hugging Face: `AutoModelForCausalLM.from_pretrained(DIR, trust_remote_code=True)`.

folder.py      the files of a folder, written whole or not at all
modeling.py    the model and its cache as transformers knows them; what export writes as `modeling_performer.py`
sources.py     the package's own sources put into that one file
stand_ins.py   what takes the place of einops and annotated_types there
llama.py       models that are Llama's by another name, which need no code of ours
library.py     tokenizers as a `tokenizer.json`
card.py        README.md
program.py     a model as programs of torch.export
"""
