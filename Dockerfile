# docker build -t octant .
# docker run --rm --gpus all --ipc=host -v "$PWD":/work octant train my.yaml
#
# Without a GPU leave --gpus out.  --ipc=host: NCCL shares memory, and docker's default of 64 MB is too little.
# The torch of the default index is a CUDA build; PIP_FLAGS is handed to pip, for another index say.
FROM python:3.12-slim

ARG PIP_FLAGS=""
COPY . /opt/octant
RUN pip install --no-cache-dir $PIP_FLAGS "/opt/octant[hf,data]"

WORKDIR /work
ENTRYPOINT ["octant"]
CMD ["doctor"]
