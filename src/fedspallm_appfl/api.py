"""placeholder"""

from fedspallm_appfl.runs import run_dir
from fedspallm_appfl.validation import files as with_files
from fedspallm_appfl.validation import rules


def problems_of(config, globus, files, overwrite):
    problems = rules.check(config)
    config = prepared(config, globus)
    problems += rules.check_for_globus(config) if globus else rules.check_on_this_machine(config)
    problem = run_dir.problem(config, overwrite) if config.run_dir else None
    problems += [problem] if problem else []
    if files:
        problems += with_files.check_with_files(config)
    return problems


def prepared(config, globus):
    return rules.prepared_for_globus(config) if globus else config
