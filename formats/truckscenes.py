"""What MAN TruckScenes (Fent et al., NeurIPS 2024) has otherwise than nuScenes, as truckscenes-devkit 1.2.0 has it."""

import dataclasses

from formats.nuscenes import CYCLE, NUSCENES, PERSON, VEHICLE

# What names of scenes have in common: the numbers of train/val/test, "m" those of the mini version (their splits.py).
SCENES = """
0044384af3d8494e913fb8b14915239e:5,7,8,11/3m/ 0afa5cb3c6d34a998a7da1c6206511c7:1,2,4,6,7/3,5/
0c2e941c5ba2476b9e20b29ce4c678b9:3,7,8,10,12,14,18,19//4,11 107c9d01fd73443db745c516e25f71bc:1,2//
13f4b71b1bd04a9e88747ad8f58a3f67:2,5-8,10-12,14-16/3,4m,9,13/1 151b4346109a43769f29f0a7ec75fb1d:1,2,4-8//
19d55ce5a6a44f109a6909f484d23f76:3,5/1/2,4 1b57d08cec074fbb99b64a2c514b1b09:1,3,4,7-10//2,5,6
23160c4bff134cdd86b96ee822b4aca9:4,7,14m,20,23/2,18/ 279bd0e470b04855bdcc27cbfbcf2dbb:5-7//
28b45fa9ee494954a8879547a3e3340d:1,2,4-8// 28de58d229174d86a10be6a756c2b2cc:3,4,7,8//
2a8ba56871df4cbd9ae75f13c3171af2:2,4,8/6/ 30b0fa9fa9ec4284961734504bd5ca1e:1,6,8,13,14,17/10-12/7,9,15,16
3195e3bfd1de4f9ba82f874790c7856c:4-6,9-12,15m,16-20,22/13/2,8,21,23 3b2209c7534c4ad9b80a48b1b0c0682a:2,4,6-9//1,3,5,10
3f542f89ec5241b6a4e30ca743adcf34:1,4,6-10,15-17,19,21,22,24,26-28,29m,30-32,34,37,38,40,41/3,5,33,35/2,11,18,23,25,39
40b113e5ad554aa089f7f6f5dc2c4c3f:2,3// 41640f6466f34238b0c03f673abe9417:2,3,5,6,9-12,15,17-23/13,14,16/1,4,7,8
42e22d1a78da4bf5a1738dbae09fd6e2:5//2,3 47d21ae92c444c698d3db575db1dc8b7:2,7,10,11,14/8/6
4e55ee3cceca4d1f898971a91bd4d484:1/2/ 538ab15b0996453584970e99a7d82d34:2,6,9,10/5/4,11
57f9e1f3e5bc4ab9a1d7a715d71b3c68:3-7,9-14//1,2 5d1be655af144d6986ab8c0280cf3221:2,5,6//3
61eecde6d6fb4ffeb15d59b428066b5a:1-4,6-16//5 6be74229febb4aad9e7ae1a37217b231:1,2,4m/3/
6ef44746fd28480cb19b5067ae254496:1,7/4/
7174d2619b1c40f0a150811fe83c98eb:1,5,7,9-11,13,16,20,22,27,28,31,33-36,38/2,4,8,17,19,30/6,25,26
733ceacf71ac460e89a2be2cc4e6495c:1,3,6,9,10//2,4,7,8 7412f997e097401c93900b0770eeec4a:5,8/3/1,4,6
757adc42b1aa4436a62036e10e3999ce:1,4-9,11,13-15,17-19/3/2,10,12,16 77886a3724c74c87a829ba90212673df:1,3,9,13//4,5
7d6fe6a041cd4ee3bd400a747ce9d94d:4-6,8,9/2/10 7e57e2d0f7b548abaf3c02128187821a:1,4,5//2,3
7fbc277618a24a44a1daa525c08966c3://1,2 8a3726a7bf664c0a93c846303753405c:1// 8b00191242364d7fbe58a4dc2e11203c:1//
8d2561fcaae94ef2b121129b40e399be:3,4// 8e4cb91735074f69aaad8824fc4a5ff8:2,3,5,8,10-13,19-21/17/15,16
8fd3963427644c53a3aa7da1cefd455e:2,3,5-9,12//1,4,10,13 962178b446f0414797c0f75b020dbdef:3,5-7,9,13//1,2,4,10-12
9a38f389937c4b3f96a8b81eb3902261:1,3,4//2 9b7f8b017e8c48d9816c4afa150c60a2:2-4,7,9/1,6,8/5
9db2aaafda8c40efbb195b214311f4f2:1,4,6-8/2/10,13 a038db099ca34ec4b8a9422758969bb8:1,4,6,8,13,15,17/7,9/2,3,5,10,11
a07c321013b94cf0a0c281f59d0455bc:1,4,5,7,8,11,12/3/2,6,9,10 a2fd0ce217b5420982d94bccc8e0614c:2,4,8,12/1,9,15/14
a47fe0701d2b40628c47322c9f991986:1-6,9,11,12/7,8,10,13/14 a4d0d23b996a429b97d827a47a284692:2,4//3,5
a6a87db5125846bda72ccfc9931ee153:1,3,4,8,10,11m/2,9/6,7 a85ecba64f744f68aa06ba82d721ad40:1,2,6,10-16/9/
ae05e8a50c764314916025ab0482b126:1,3//2,4 b13542304b244af585a646082c57a079:1m,5-7//
b201f6e737e34c2d87830fc1e2911516:2-5,6m,7,9-13/8,14/1
b502fc44d4324e1cb0349f8fa46d4014:7,9,11,13,15,17,21,27,29,31,35,37,41,45,47,49,51,55,59//25,39
b662852bb66c43b49c0dfacfdeebd2a5:1,3,7,11,12/9/ b8e7da1bd8d6430792a51b52fea484a5:1,3-5/2/
bbae3a9a7249479785a7598bafc84217:1-5,8/7/ bbfc65ba29ae4f99872d6d82ae2278b7:1,2//3
bd14694f937f4df3aa278c5a9cc2a554:1,3,10,11,13-15,17-23//2,4-9,12,16,24
c1b21af2e68e4ab28d8afd75d8b8f34c:1,3,5-12,14,17,18,20,22,23/13/2,4,15,19 c42044acd54f47509632f05a9fa851e5:5//2
c95d907aed7f472e9fd73f9aac273878:3,4,7-25,29,30/5,6,26,28/27,31 ca5494b037de4f59b1cfa66e7c5d8ed3:/2/1,5,6
ca5c77238bd64f168aeb98c6dc06f022:1,3,4,7,8//2,5,6 cc3bdae2b0a244db821e609e2f31ac6b:5,6,9-11,13,14/3/7,8,16
d24a0af639f642b9a721437b6ac8a893:1,3-6,8,9/2,10/7 dc3dd4c95cee424dbc21b7f1ed92b945:2,5//1
df73192e74434050bae9fa05ff713dc2:1-4//
e1dbd50ff4694a46b4997f4dec87f667:3,5,13,17,19,25,33,39,41,47,49,51,53,57/27,29/1,7,21,23,31,37
e3ee19c09730474890cdc9aada4f1f50:1,2// e952afac6554468896def27b953bf325:2//13 ea5f9f9ec8764612b68cca98c767aadb:1,2,4,7//
f123519a7ffd4e85bb61763335edbb6b:2,3,5-8,10/9/1,4,11 f138f02d85464218939afe22de7b92bf:2//
f64433299e854aff822d736aca2a62b4:1,3-16,20,21,24-26,28//2,17-19,22,23,27 f7f816a9689240f7aa2f20f77e67ecea:2/3/4,6
f93a210836d541c3809592c1c2671bf2:2,4,5//3 fb64d203d417452f830ca73efed80c41:6-10,11m,12,13,15/5/3,4,14
fc798fa53f614e9d991c4d1c893eb6d5:1,3,5,6,8-10/2/7 fdac5b1b465e4affaae74ac616150676:/1/
"""
SIGN = ("traffic_sign.pole_mounted", "traffic_sign.overhanging", "traffic_sign.temporary")


def scenes_of(part: int, mini: bool = False) -> tuple[str, ...]:
    """Names of the scenes of train (0), val (1) or test (2), or of those of them that the mini version holds."""
    names = []
    for word in SCENES.split():
        log, _, parts = word.partition(":")
        for numbers in filter(None, parts.split("/")[part].split(",")):
            if numbers.endswith("m") or not mini:
                first, _, last = numbers.rstrip("m").partition("-")
                names += [f"scene-{log}-{number}" for number in range(int(first), int(last or first) + 1)]
    return tuple(names)


DIALECT = dataclasses.replace(
    NUSCENES,
    tables=("v*-*",),
    splits={
        "train": scenes_of(0), "train_detect": scenes_of(0), "val": scenes_of(1), "test": scenes_of(2),
        "mini_train": scenes_of(0, mini=True), "mini_val": scenes_of(1, mini=True),
    },
    versions=NUSCENES.versions | {"train_detect": "trainval"},
    classes=NUSCENES.classes | {  # the own trailer, 7 m behind the truck, is one
        "vehicle.construction": "other_vehicle", "vehicle.other": "other_vehicle", "vehicle.ego_trailer": "trailer",
        "static_object.traffic_sign": "traffic_sign",
    },
    ranges=dict.fromkeys(("car", "truck", "bus", "trailer", "other_vehicle"), 150) | dict.fromkeys(
        ("pedestrian", "motorcycle", "bicycle", "traffic_cone", "barrier", "animal", "traffic_sign"), 75
    ),
    attributes=dict.fromkeys(("car", "truck", "bus", "trailer", "other_vehicle"), VEHICLE) | {
        "pedestrian": PERSON, "motorcycle": CYCLE, "bicycle": CYCLE, "traffic_cone": (), "barrier": (), "animal": (),
        "traffic_sign": SIGN,
    },
    usual=NUSCENES.usual | {"other_vehicle": "vehicle.parked", "traffic_sign": SIGN[0]},  # for those two a guess
    reference=("LIDAR_LEFT",),
    undefined=NUSCENES.undefined | {"animal": ("attr_err",), "traffic_sign": ("vel_err",)},
    half_turns=("barrier", "traffic_sign"),
)  # fmt: skip
