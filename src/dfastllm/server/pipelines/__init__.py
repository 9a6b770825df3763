"""Pipelines: steps of models and WebAssembly modules, kept on a running server and run by name.

| module | what |
|---|---|
| schema | the form of a pipeline and of what a run tells |
| templates | Jinja in a sandbox |
| pipeline | a pipeline understood: names, order, options, modules |
| run | a run of one |
| asking | a run begun for an identity: each step a request like any other |
| kept | where pipelines are kept |
| routes | HTTP |
"""

__all__: list[str] = []
