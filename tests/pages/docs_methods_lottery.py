import dataclasses

from tests.methods.toys import trained_mlp, vector_task

model = trained_mlp()
source_task = dataclasses.replace(vector_task(), start=model.state_dict())
