"""What :class:`~tllib_rs.self_training.mean_teacher.EMATeacher` does only when it is asked to."""
