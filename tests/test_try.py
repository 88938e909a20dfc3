import json, os, time
from tests.test_distributed import *
def test_try(make_arguments, tmp_path_factory):
    folder=tmp_path_factory.mktemp("d")
    engines=os.environ.get("ENG","ddp,zero1,zero2,zero3,fsdp2").split(",")
    cases=[]
    for e in engines:
        for v,ch in VARIANTS.items():
            for n,steps in (("mixes",MIXES),("accumulated",ACCUMULATED)):
                a=sgd_arguments(make_arguments,folder,**ch,**engine_arguments(e,folder),max_steps=len(steps),gradient_accumulation_steps=len(steps[0][0]),output_dir=str(folder/"out"))
                cases.append({"name":f"{e}-{v}-{n}","arguments":a,"steps":steps})
    t=time.time(); r=launch(cases,folder); print("took",time.time()-t)
    for c in cases:
        o=json.loads((r/f"{c['name']}.json").read_text())
        w=load_file(r/f"{c['name']}.safetensors")
        ref=list(plain_sgd(c["arguments"],c["steps"]))
        d={k:float((w[k]-ref[-1][1][k]).abs().max()) for k in ref[-1][1]}
        init=max(d.items(),key=lambda x:x[1])
        print(c["name"],o["engine"],o["stage"],"loss diff",max(abs(a-b[0]) for a,b in zip(o["losses"],ref)),"w",init,len(w)==len(ref[-1][1]), o["norms"][:2])
