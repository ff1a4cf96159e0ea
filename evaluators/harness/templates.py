"""Templates of tasks as data: rendered in a sandbox, since the harness's own may run anything."""

from __future__ import annotations


def sandbox_templates() -> None:
    """Let the harness render the templates of task files in Jinja's sandbox.

    Its own environment gives templates every attribute of every object, from which any code can be
    reached. In the sandbox, what a template may not reach is an error of the task.
    """
    from jinja2 import BaseLoader, StrictUndefined
    from jinja2.sandbox import SandboxedEnvironment
    from lm_eval import utils

    if isinstance(utils.env, SandboxedEnvironment):
        return
    sandbox = SandboxedEnvironment(
        loader=BaseLoader(),
        undefined=StrictUndefined,
        keep_trailing_newline=utils.env.keep_trailing_newline,
    )
    sandbox.filters.update(utils.env.filters)
    utils.env = sandbox
