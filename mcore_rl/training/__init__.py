"""How a run trains, on every rank: SPMD, without a driver.

a step         loop.py: generation.py, advantage.py, batch.py, model_passes.py, objective.py, publish.py
generation     prompt_source.py, requests.py, environment.py, dynamic_sampling.py, rewards.py, servers.py,
               mismatch.py
the critic     critic.py; kl_control.py: the coefficient of an adaptive KL
baselines      greedy.py: of a greedy answer; roles.py: of a role
evaluation     evaluate.py, evaluation_sets.py
other kinds    session.py: supervised.py, preference.py, reward_model.py, distill.py; teachers.py,
               reference.py, sequence_objective.py
building       assemble.py, assemble_rollouts.py, assemble_servers.py, setup.py: run.py, trainer.py
what is kept   checkpoint.py, rundir.py, metrics.py, recorder.py, inputs.py, bad_rows.py
dumps          keep_rollouts.py, from_dumps.py, check_dump.py, dump_directories.py, sample_only.py
faults/        hangs, ends of ranks, values that are not finite
"""
