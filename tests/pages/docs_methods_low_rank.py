import dataclasses

from tests.methods.toys import conv_maker as network
from tests.methods.toys import trained_mlp, vector_task

model, source_task = trained_mlp(), dataclasses.replace(vector_task(), target=vector_task(1))
