"""The recipe of a config on Apache Beam: ``python beam_runner.py CONFIG.yaml --runner=...``.

As `pairmill run`, with Beam's pipeline options behind it. See docs/beam.md.
"""

from __future__ import annotations

import json

import typer

from pairmill.cli import main, prepare, run
from pairmill.commands.common import AsJson, Config, Debug, Overrides, RetryDeferred, Wait
from pairmill.errors import ConfigError

app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)


@app.command(
    no_args_is_help=True,
    options_metavar="[OPTIONS] [--PIPELINE_OPTION=VALUE ...]",
    context_settings={
        "allow_extra_args": True,
        "ignore_unknown_options": True,
        "help_option_names": ["-h", "--help"],
    },
)
def beam(
    context: typer.Context,
    config: Config,
    overrides: Overrides = None,
    retry_deferred: RetryDeferred = False,
    wait: Wait = 0.0,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Run a config's recipe on Apache Beam: as `pairmill run`, with the stages on the runner that Beam's pipeline
    options name. The driver plans, commits and publishes; interrupted, the same command goes on.

    \b
    Examples:
      python beam_runner.py config.yaml --runner=DirectRunner
      python beam_runner.py config.yaml --runner=FnApiRunner --direct_num_workers=4
          --direct_running_mode=multi_processing
      python beam_runner.py config.yaml --runner=DaskRunner
      python beam_runner.py config.yaml --runner=FlinkRunner --flink_master=host:8081
          --environment_type=DOCKER --environment_config=IMAGE
      python beam_runner.py config.yaml --runner=DataflowRunner --project=PROJECT --region=REGION
          --temp_location=gs://BUCKET/tmp --sdk_container_image=IMAGE --max_num_workers=20

    Pipeline options are written --name=value, behind the config, and count before those
    that it holds in engine.pipeline_options; docs/beam.md has them by runner.

    Exit codes: 0 done; 1 the run failed; 2 the config or the arguments are wrong;
    130 interrupted, run it again to go on.
    """
    from pairmill.run import load_config

    prepare(debug)
    if config.startswith("-"):
        raise ConfigError(f"{config} stands where the config is expected: CONFIG.yaml comes first")
    options = [*load_config(config, overrides or []).engine.pipeline_options, *context.args]
    chosen = ["engine.kind=beam", f"engine.pipeline_options={json.dumps(options)}"]
    run(config, [*(overrides or []), *chosen], retry_deferred, wait=wait, as_json=as_json)


if __name__ == "__main__":
    main(app, "beam_runner.py")
