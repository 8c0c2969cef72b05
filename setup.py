"""Installs `gemma4_jax`. Extras are imported where they are used, and an error names the one that is missing."""

from pathlib import Path
import re

import setuptools

HERE = Path(__file__).parent

setuptools.setup(
    name='gemma4_jax',
    version=re.search(r"__version__ = '(.*)'", (HERE / 'gemma4_jax/__init__.py').read_text())[1],
    description='Gemma 4 in JAX: functional Flax modules composed by configs, for ablations from a laptop to a pod',
    long_description=(HERE / 'README.md').read_text(),
    long_description_content_type='text/markdown',
    license='Apache-2.0',
    packages=setuptools.find_packages(include=['gemma4_jax', 'gemma4_jax.*']),
    package_data={'gemma4_jax.native': ['*.cc']},
    python_requires='>=3.11',
    install_requires=[
        'jax>=0.10.0', 'flax>=0.12.8', 'optax>=0.2.8', 'orbax-checkpoint>=0.12.8', 'numpy>=2.0', 'ml-collections>=1.1',
        'absl-py', 'grain>=0.2.18', 'tokenizers>=0.23', 'rich', 'matplotlib', 'scipy', 'safetensors>=0.8',
    ],
    extras_require={
        'test': [   # and torch and accelerate, for live parity
            'pytest', 'transformers>=5.23', 'tensorboardX', 'pyarrow', 'hypothesis', 'jinja2', 'pytest-xdist',
            'nbclient', 'ipykernel', 'lm_eval>=0.4.13'],
        'peer': ['torch', 'transformers>=5.23'],        # experiments/speed.py --peer=hf
        'llama_cpp': ['llama-cpp-python', 'gguf', 'sentencepiece', 'torch', 'transformers>=5.23'],   # ... --peer=llama_cpp
        'data': ['datasets', 'pyarrow'],                # data.source = 'hf', 'parquet'
        'chat': ['jinja2'],                             # chat templates that checkpoints carry
        'lm_eval': ['lm_eval[ifeval,ruler]>=0.4.13', 'transformers>=5.23'],   # cli.evaluate --task=lm_eval:NAME; RULER's tokenizer
        'tensorboard': ['tensorboardX'],
        'wandb': ['wandb'],
        'aot': [    # compilers for machines that are not here: libtpu as JAX itself pins it, the CUDA plugin of JAX's own version
            'jax[tpu]', "jax-cuda13-plugin==0.10.2; python_version < '3.12'", "jax-cuda13-pjrt==0.10.2; python_version < '3.12'",
            "jax-cuda13-plugin==0.12.0.1; python_version >= '3.12'", "jax-cuda13-pjrt==0.12.0.1; python_version >= '3.12'"],
        'cuda': ['jax[cuda13]'],                        # of drivers from 580 on
        'cuda12': ['jax[cuda12]'],
        'tpu': ['jax[tpu]'],
    },
)
